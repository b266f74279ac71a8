import json
import re
import zipfile

import pytest
import torch

import train_mdm
from data import text8
from data.text import load_text
from nano_db.errors import UsageError

TINY = ("--preset", "tiny", "--layers", "3", "--steps", "6", "--device", "cpu", "--eval-windows", "4")


@pytest.fixture
def mdm(cli, text_file, tmp_path):
    return lambda *flags: cli(*TINY, "--data", text_file, "--out", tmp_path / "run", *flags, main=train_mdm.main)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), marks=pytest.mark.whole),
        ("--schedule", "cosine", "--ema", "0.9", "--layer-split", "1,1,1"),
        ("--baseline", "--ensemble", "2"),
    ],
)
def test_a_run_scores_samples_and_resumes(mdm, tmp_path, flags):
    code, out, err = mdm(*flags)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    metrics = result["metrics"]
    assert sum(metrics["nats_per_block"]) == pytest.approx(metrics["nats_per_token"])
    assert ("after block 2:" in out) == ("--baseline" not in flags)
    code, out, _ = mdm(*flags)
    assert code == 0 and "loss" not in out
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["metrics"] == metrics


def test_only_trains_one_block_at_a_time(mdm, tmp_path):
    for b in (2, 0, 1):
        code, out, _ = mdm("--only", b)
        assert code == 0 and ("still to train" in out) == (b != 1)


def test_one_window_is_evaluated_where_one_is_asked_for(mdm, heldout_windows):
    code, _, err = mdm("--eval-windows", "1")
    assert code == 0 and heldout_windows == [1, 1], "of either half: " + err


def test_fill_keeps_the_text_and_fills_the_gaps(mdm, cli, tmp_path):
    mdm()
    again = ("--eval-only", "--out", tmp_path / "run", "--fill")
    for gap, flags in (("▁", ()), ("q", ("--gap", "q"))):  # the text has a q, which then cannot be asked for
        code, out, err = cli(*again, f"the {4 * gap} of", *flags, main=train_mdm.main)
        assert code == 0 and "masked: the ▁▁▁▁ of" in out, err
        filled = out.strip().splitlines()[-1]
        assert filled.startswith("the ") and filled.endswith(" of") and len(filled) == 11 and "▁" not in filled
    whole = "the brown fox i▁"  # as long as the network reads
    code, out, err = cli(*again, whole, main=train_mdm.main)
    assert code == 0 and out.strip().splitlines()[-1].startswith(whole[:-1]), err


def test_signs_that_stand_in_texts_are_no_gaps(cli, tmp_path):
    """An underscore stands in every other line of a program."""
    (tmp_path / "text.py").write_text("def __init__(self, name):\n    self.name = name\n" * 60)
    quick = ("--preset", "tiny", "--layers", "3", "--steps", "4", "--device", "cpu", "--out", tmp_path / "run")
    fill = ("--fill", "__init__(▁▁▁▁)")
    code, out, err = cli(*quick, "--data", tmp_path / "text.py", *fill, main=train_mdm.main)
    assert code == 0, err
    assert "masked: __init__(▁▁▁▁)" in out and re.search(r"^__init__\(.{4}\)$", out, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--fill", "▁" * 17), "the network reads 16"),
        (("--fill", "Ä▁"), "'Ä'"),
        (("--fill", "a▁", "--gap", "ab"), "--gap 'ab' must be a single character"),
        (("--fill", "a▁", "--gap", ""), "--gap '' must be a single character"),
        (("--gap", "?"), "--gap does nothing without --fill"),
        (("--fill", "the dog"), "--fill has no gap: write ▁"),
        (("--fill", "the brown fox is"), "--fill has no gap: write ▁"),  # as long as the network reads
        (("--blocks", "4"), "4 blocks are too many for 3 layers"),
        (("--recipe", "paper"), "unrecognized"),
        (("--sampling-steps", "0"), "at least 1"),
        (("--schedule", "square"), "invalid choice"),
        (("--baseline", "--overlap", "0.1"), "--overlap does nothing with the baseline method"),
        (("--layer-split", "1,1"), "must be 3 whole numbers above 0, which add up to 3 layers"),
        (("--layer-split", "1,1,x"), "the layer split '1,1,x' must be"),
        (("--width", "18"), "width 18 is not a multiple of 4"),
    ],
)
def test_bad_input_gets_one_clear_line(mdm, flags, message):
    code, _, err = mdm(*flags)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_text8_is_read_from_a_local_file_and_checked(tmp_path, monkeypatch):
    content = b"some words " * 100
    monkeypatch.setattr(text8, "SIZE", len(content))
    monkeypatch.setattr(text8, "MD5", text8.hashlib.md5(content).hexdigest())
    (tmp_path / "text8").write_bytes(content)
    assert text8.text(tmp_path)[0] == content.decode()
    (tmp_path / "text8").write_bytes(content[:-1] + b"x")
    with pytest.raises(UsageError, match="not text8"):
        text8.text(tmp_path)


def test_text8_is_read_from_a_local_archive(tmp_path, monkeypatch):
    content = b"some words " * 100
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", content)
    digest = text8.hashlib.sha256((tmp_path / "text8.zip").read_bytes()).hexdigest()
    for name, value in {"SIZE": 1100, "MD5": text8.hashlib.md5(content).hexdigest(), "SHA256": digest}.items():
        monkeypatch.setattr(text8, name, value)
    assert text8.text(tmp_path)[0] == content.decode()
    monkeypatch.setattr(text8, "SHA256", digest[::-1])
    with pytest.raises(UsageError, match="sha256"):
        text8.text(tmp_path)


def test_text8_is_split_ninety_to_five(tmp_path, monkeypatch):
    content = b"ab " * 200
    numbers = {"SIZE": 600, "MD5": text8.hashlib.md5(content).hexdigest(), "TRAIN": 540, "VALIDATION": 30}
    for name, value in numbers.items():
        monkeypatch.setattr(text8, name, value)
    (tmp_path / "text8").write_bytes(content)
    text = load_text("text8", folder=tmp_path, seq_len=4)
    (tmp_path / "file").write_bytes(content[:570])  # the same characters, cut after nine tenths
    file = load_text(str(tmp_path / "file"), seq_len=4)
    assert len(file.train) == 513 and file.sha256 != text.sha256
    assert (len(text.train), len(text.heldout)) == (540, 30) and text.train.dtype == torch.uint8
