"""Texts for outside judges: what is kept of a window, what is sampled anew, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

import train_gpt
import train_looped
import train_mdm
from data.text import load_text
from nano_db.trainer.report import export_texts

TINY = ("--preset", "tiny", "--steps", "4", "--warmup", "1", "--device", "cpu", "--eval-windows", "2", "--samples", "0")


def exported(folder):
    return [json.loads(line) for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "script, flags",
    [
        (train_gpt, ()),
        pytest.param(train_gpt, ("--baseline",), marks=pytest.mark.slow),
        pytest.param(train_looped, (), marks=pytest.mark.slow),
        (train_mdm, ("--sampling-steps", "3")),
    ],
    ids=["gpt", "gpt-baseline", "looped", "mdm"],
)
def test_held_out_windows_are_written_anew_after_their_first_quarter(cli, text_file, tmp_path, script, flags):
    run = ("--out", tmp_path / "run")
    code, _, err = cli(*TINY, "--data", text_file, "--export", "3", *run, *flags, main=script.main)
    assert code == 0, err
    lines, text = exported(tmp_path / "run"), load_text(str(text_file))
    windows = torch.cat([x for x, _ in text.heldout_batches(8, 16, windows=3)])
    assert [line["prompt"] + line["original"] for line in lines] == list(map(text.tokenizer.decode, windows.tolist()))
    assert {(len(line["prompt"]), len(line["generated"])) for line in lines} == {(4, 12)}
    assert any(line["generated"] != line["original"] for line in lines)
    code, _, err = cli("--eval-only", "--samples", "0", "--export", "2", *run, main=script.main)
    again = exported(tmp_path / "run")
    assert code == 0 and len(again) == 2 and again[0]["prompt"] == lines[0]["prompt"], err


def test_more_windows_than_are_held_out_are_refused_before_the_training(cli, text_file, tmp_path):
    code, _, err = cli(*TINY, "--data", text_file, "--export", "9999", "--out", tmp_path / "run", main=train_gpt.main)
    assert code == 2 and "--export 9999: the held-out text has only" in err and not (tmp_path / "run").exists()


def test_only_what_follows_the_prompt_comes_from_the_model(text_file, tmp_path):
    """A model that returns what it was given, and then the first token over and over; 20 windows are two batches."""
    text, seen = load_text(str(text_file)), []

    def complete(tokens, length, generator, settings, *model):
        assert settings is run.settings and model == ("a", "model")
        seen.append((tuple(tokens.shape), length, generator.initial_seed()))
        return tokens[:, :1].expand(-1, 8).clone()

    run = SimpleNamespace(folder=tmp_path, settings=SimpleNamespace(seq_len=8, device="cpu", export=20, seed=7))
    run.last_round = False  # in which nothing is written yet
    export_texts(run, text, complete, "a", "model")
    assert seen == [] and not (tmp_path / "texts.jsonl").exists()
    run.last_round = True
    export_texts(run, text, complete, "a", "model")
    assert seen == [((16, 2), 6, 7), ((4, 2), 6, 7)] and len(exported(tmp_path)) == 20
    assert all(line["generated"] == 6 * line["prompt"][0] for line in exported(tmp_path))
