"""Runs that are used, or trained further, without the data that they were trained on, or on other data."""

import json
import shutil

import pytest
import torch
from conftest import same, tensors
from test_image_folder import fill

import data.text
import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from data import glyphs
from data.text import load_text
from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import read_config

FOX = "the quick brown fox jumps over the lazy dog. "
QUICK = ("--preset", "tiny", "--steps", "4", "--device", "cpu")
DIT = (*QUICK, "--layers", "3", "--sampling-steps", "6", "--frechet-images", "0", "--samples", "2")
TEXTS = {
    "gpt": (train_gpt.main, ("--layers", "4")),
    "gpt-baseline": (train_gpt.main, ("--layers", "2", "--baseline")),
    "looped": (train_looped.main, ()),
    "mdm": (train_mdm.main, ("--layers", "3")),
}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    for script in (train_gpt, train_looped):
        monkeypatch.setitem(script.PRESETS, "tiny", {**script.PRESETS["tiny"], "sample_length": 5, "eval_windows": 4})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


# --- writing elsewhere ---


@pytest.mark.parametrize(
    "name, data",
    [("gpt", "other"), ("gpt", "absent"), ("gpt-baseline", "other"), ("looped", "other"), ("mdm", "absent")],
)
def test_a_network_writes_without_its_text_and_says_that_it_cannot_be_scored(cli, tmp_path, name, data):
    main, flags = TEXTS[name]
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(FOX * 80)
    assert cli(*QUICK, *flags, "--data", text, "--out", run, main=main)[0] == 0
    code, scored, err = cli("--eval-only", "--out", run, main=main)
    assert code == 0 and "bits per character" in scored, err
    text.unlink() if data == "absent" else text.write_text("Ünd alles anders! " * 80)
    before = contents(run)
    code, out, err = cli("--eval-only", "--out", run, main=main)
    assert code == 0 and "not scored" in out and "bits per character" not in out and contents(run) == before, err
    assert out.split("---\n", 1)[1] == scored.split("---\n", 1)[1], "the same samples as with the text"
    assert ("No such file" if data == "absent" else "is not the text that the run was trained on") in out


def test_a_prompt_is_continued_and_a_gap_filled_without_the_text(cli, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(FOX * 80)
    for name, flags in (("gpt", ("--prompt", "the lazy")), ("mdm", ("--fill", "the ▁▁▁▁ dog"))):
        main, more = TEXTS[name]
        run = tmp_path / name
        assert cli(*QUICK, *more, "--data", text, "--out", run, main=main)[0] == 0
        text.rename(tmp_path / "away")
        code, out, err = cli("--eval-only", "--out", run, *flags, main=main)
        assert code == 0 and ("the lazy|" in out or "masked: the ▁▁▁▁ dog" in out), err
        code, _, err = cli("--eval-only", "--out", run, flags[0], "Ü▁", main=main)
        assert code == 2 and "'Ü'" in err and err.count("\n") == 1, err
        code, _, err = cli("--eval-only", "--out", run, "--export", "2", main=main)
        assert code == 2 and "--export needs the text" in err and err.count("\n") == 1, err
        (tmp_path / "away").rename(text)


def test_the_manual_of_another_python_is_another_text(cli, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert cli(*QUICK, "--layers", "4", "--only", "0,1,2,3", "--samples", "0", "--out", run)[0] == 0
    monkeypatch.setitem(data.text.TEXTS, "pydocs", lambda folder: (FOX * 80, len(FOX) * 72))
    code, out, err = cli("--eval-only", "--out", run)
    assert code == 0 and "--data pydocs is not the text that the run was trained on" in out, err
    code, _, err = cli(*QUICK, "--layers", "4", "--out", run)
    assert code == 2 and "the data has changed" in err and err.count("\n") == 1, "but training needs it"


@pytest.mark.slow
def test_a_dit_samples_without_its_images(cli, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert cli(*DIT, "--out", run, main=train_dit.main)[0] == 0
    make = glyphs.make
    monkeypatch.setattr(glyphs, "make", lambda fonts, count, seed: make(fonts, count, seed + 7))  # other fonts, say
    code, out, err = cli("--eval-only", "--out", run, main=train_dit.main)
    assert code == 0 and "not scored" in out and "EDM loss" not in out, err
    assert (run / "samples-again.png").stat().st_size > 0
    assert "p_mean 0.5 (the run's), sigma_data 0.9 (the run's)" in out
    assert cli(*QUICK, "--layers", "3", "--out", tmp_path / "vit", main=train_vit.main)[0] == 0
    monkeypatch.setattr(glyphs, "make", lambda fonts, count, seed: make(fonts, count, seed))
    code, _, err = cli("--eval-only", "--out", tmp_path / "vit", main=train_vit.main)
    assert code == 2 and "A classifier can only be scored" in err and err.count("\n") == 1, err


DAMAGED = [
    {"vocabulary": "", "opening": "the"}, {"vocabulary": 3}, {"vocabulary": "ab\ud800", "opening": "a"},
    {"vocabulary": "abc", "opening": "xyz"}, {"vocabulary": "abc"}, {"what": 1}, [], {}, {"shape": [3]},
    {"p_mean": float("nan")}, {"sigma_data": 0.0}, {"classes": []},
]  # fmt: skip


def test_a_vocabulary_that_is_damaged_is_one_line(cli, text_file, tmp_path):
    run = tmp_path / "run"
    assert cli(*QUICK, "--layers", "4", "--samples", "0", "--data", text_file, "--out", run)[0] == 0
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for keeps in DAMAGED:
        (run / "config.json").write_text(json.dumps({**config, "keeps": keeps}))
        code, _, err = cli("--eval-only", "--out", run, "--data", "nowhere")
        assert code == 2 and err.count("\n") == 1, (keeps, err)


# --- texts of one's own, and training further ---


@pytest.mark.parametrize("flags", [("--blocks", "2"), ("--baseline",), ("--baseline", "--ensemble", "2")])
def test_each_network_continues_from_its_own_on_another_text(small, cli, tmp_path, flags):
    """At a learning rate of nearly nothing a network stays what it was."""
    source, mine = tmp_path / "source", tmp_path / "mine.txt"
    assert small(*flags, "--out", source)[0] == 0
    mine.write_text("a lazy dog is no quick fox. " * 120)
    still = ("--learning-rate", "1e-12", "--steps", "2", "--warmup", "0", "--data", mine)
    code, out, err = small(*flags, "--init-from", source, *still, "--out", tmp_path / "run")
    assert code == 0 and "bits per character" in out, err
    for b in range(1 if flags == ("--baseline",) else 2):
        before, after = (torch.load(f / f"block_{b}.pt", weights_only=True) for f in (source, tmp_path / "run"))
        assert before["step"] == 12 and after["step"] == 2
        for name, weight in before["weights"].items():
            torch.testing.assert_close(after["weights"][name], weight, rtol=0, atol=1e-6)
    there, here = read_config(source), read_config(tmp_path / "run")
    assert there["keeps"]["vocabulary"] == here["keeps"]["vocabulary"] and there["depends_on"] != here["depends_on"]
    shutil.move(source, tmp_path / "gone")  # begun, it needs neither
    mine.unlink()
    code, out, err = cli("--eval-only", "--out", tmp_path / "run")
    assert code == 0 and "not scored" in out, err


def test_characters_that_the_network_does_not_know_are_one_line(small, tmp_path):
    source, mine = tmp_path / "source", tmp_path / "mine.txt"
    assert small("--blocks", "2", "--samples", "0", "--out", source)[0] == 0
    mine.write_text("Ähnliche Füchse. " * 120, encoding="utf-8")
    code, _, err = small("--blocks", "2", "--init-from", source, "--data", mine, "--out", tmp_path / "run")
    assert code == 2 and f"--data {mine} has characters" in err and "'F' 'Ä' 'ü'" in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_trained_further_with_a_new_schedule(small, tmp_path):
    assert small("--out", tmp_path / "run")[0] == 0
    code, _, err = small("--steps", "20", "--init-from", tmp_path / "run", "--out", tmp_path / "run")
    assert code == 2 and "is --out itself: give the new run another --out" in err and err.count("\n") == 1, err
    code, _, err = small("--steps", "20", "--out", tmp_path / "run")
    assert (
        code == 2 and f"to train that run further, add --init-from {tmp_path / 'run'}" in err and err.count("\n") == 1
    ), err
    code, out, err = small("--steps", "20", "--init-from", tmp_path / "run", "--out", tmp_path / "longer")
    assert code == 0 and "step 20/20" in out, err
    for b in range(4):
        first, further = (torch.load(tmp_path / f / f"block_{b}.pt", weights_only=True) for f in ("run", "longer"))
        moved = [(further["weights"][name] - weight).abs().max() for name, weight in first["weights"].items()]
        assert 0 < max(moved) < 0.05 and further["step"] == 20
    alone = ("--steps", "20", "--init-from", tmp_path / "run", "--only", "2", "--out", tmp_path / "alone")
    assert small(*alone)[0] == 0
    assert same(tensors(tmp_path / "longer", 2), tensors(tmp_path / "alone", 2))


@pytest.mark.parametrize("name", ["looped", "mdm"])
def test_the_other_scripts_are_trained_further_too(cli, text_file, tmp_path, name):
    main, flags = TEXTS[name]
    flags = (*QUICK, *flags, "--samples", "0", "--data", text_file)
    assert cli(*flags, "--out", tmp_path / "a", main=main)[0] == 0
    code, _, err = cli(*flags, "--init-from", tmp_path / "a", "--out", tmp_path / "b", main=main)
    assert code == 0, err
    if name == "looped":
        code, _, err = cli(*flags, "--baseline", "--init-from", tmp_path / "a", "--out", tmp_path / "c", main=main)
        assert code == 2 and "baseline False there, True here" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--blocks", "4"), "blocks 2 there, 4 here"),
        (("--baseline",), "baseline False there, True here"),
        (("--blocks", "2", "--head", "posterior", "--predict", "active"), "head 'denoising' there, 'posterior' here"),
        (("--blocks", "2", "--width", "32"), "width 16 there, 32 here"),
        (("--blocks", "2", "--seed", "1"), "seed 0 there, 1 here"),
    ],
)
def test_other_networks_are_refused_in_one_line(small, tmp_path, flags, message):
    assert small("--blocks", "2", "--samples", "0", "--out", tmp_path / "source")[0] == 0
    code, _, err = small(*flags, "--init-from", tmp_path / "source", "--out", tmp_path / "run")
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "run").exists(), err


def test_an_ensemble_continues_as_the_same_ensemble(small, tmp_path):
    """Of another number of members some would be copies, and the mean no control."""
    two = ("--baseline", "--layers", "2", "--samples", "0", "--ensemble")
    assert small(*two, "2", "--out", tmp_path / "two")[0] == 0
    cut = ("--layers", "2", "--blocks", "2")
    for more, message in (((*two, "3"), "ensemble 2 there, 3 here"), (cut, "ensemble 2 there, 1 here")):
        code, _, err = small(*more, "--init-from", tmp_path / "two", "--out", tmp_path / "more")
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_a_run_that_starts_from_another_draws_other_batches(small, tmp_path, monkeypatch):
    drawn, batch = [], train_gpt.batch
    monkeypatch.setattr(train_gpt, "batch", lambda *given: drawn.append(batch(*given)[0]) or (drawn[-1], drawn[-1]))
    flags = ("--blocks", "1", "--samples", "0")
    assert small(*flags, "--out", tmp_path / "a")[0] == 0
    first, drawn[:] = drawn[:12], []
    assert small(*flags, "--init-from", tmp_path / "a", "--out", tmp_path / "b")[0] == 0
    assert len(first) == 12 and not any(torch.equal(a, b) for a in first for b in drawn[:12])


def test_blocks_of_different_runs_and_unfinished_ones_are_refused(small, tmp_path):
    source, further = (
        tmp_path / "source",
        ("--blocks", "2", "--init-from", tmp_path / "source", "--out", tmp_path / "f"),
    )
    assert small("--blocks", "2", "--samples", "0", "--out", source)[0] == 0
    assert small("--blocks", "2", "--samples", "0", "--seed", "1", "--out", tmp_path / "other")[0] == 0
    sound = (source / "block_1.pt").read_bytes()
    shutil.copy(tmp_path / "other" / "block_1.pt", source)
    code, _, err = small(*further)
    assert code == 2 and "block_1.pt and block_0.pt are from different runs" in err and err.count("\n") == 1, err
    (source / "block_1.pt").write_bytes(sound)
    state = torch.load(source / "block_1.pt", weights_only=True)
    torch.save({**state, "step": 3}, source / "block_1.pt")
    code, _, err = small(*further)
    assert code == 2 and "not finished: block 1 is at step 3 of 12" in err and err.count("\n") == 1, err
    (source / "block_1.pt").unlink()
    code, _, err = small(*further)
    assert code == 2 and "block_1.pt is missing" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "classes, size, message",
    [(3, 16, "2 classes there, 3 here"), (2, 24, "images of shape [3, 16, 16] there, [3, 24, 24] here"), (2, 16, "")],
)
def test_a_dit_is_trained_further_on_other_pictures_of_the_same_shape(cli, tmp_path, classes, size, message):
    """As many classes of other names may take the place of the first."""
    fill(tmp_path / "a", 4, classes=("cat", "dog"), colour=(200, 30, 60))
    fill(tmp_path / "b", 4, classes=("x", "y", "z")[:classes], colour=(30, 30, 60))
    flags = (*DIT, "--samples", "0", "--image-size", "16", "--data")
    assert cli(*flags, tmp_path / "a", "--out", tmp_path / "run", main=train_dit.main)[0] == 0
    further = ("--init-from", tmp_path / "run", "--image-size", size, "--out", tmp_path / "further")
    code, out, err = cli(*flags, tmp_path / "b", *further, main=train_dit.main)
    if message:
        assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "further").exists(), err
    else:
        assert code == 0 and "was trained differently: p_mean" in out, err


def test_a_damaged_checksum_is_one_line(small, tmp_path):
    assert small("--blocks", "2", "--samples", "0", "--out", tmp_path / "a")[0] == 0
    further = ("--blocks", "2", "--samples", "0", "--init-from", tmp_path / "a", "--out", tmp_path / "b")
    assert small(*further)[0] == 0
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for damage in (5, "", "zz", "ab cd ef"):
        config["depends_on"]["init_from_sha256"] = damage
        path.write_text(json.dumps(config))
        code, _, err = small(*further)
        assert code == 2 and "config.json is damaged" in err and err.count("\n") == 1, err


def test_an_unfinished_run_says_so_when_it_is_evaluated(small, cli, tmp_path):
    for b in "01":
        assert small("--blocks", "2", "--only", b, "--samples", "0", "--out", tmp_path / "run")[0] == 0
    path = tmp_path / "run" / "block_1.pt"
    torch.save({**torch.load(path, weights_only=True), "step": 5}, path)
    code, out, err = cli("--eval-only", "--out", tmp_path / "run")
    assert code == 0 and "after 5 to 12 steps of each network (of 12: it is not finished):" in out, err


# --- odd texts ---


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_the_kind_of_line_ends_make_no_difference(tmp_path, mark, end):
    plain, path = tmp_path / "plain.txt", tmp_path / "text.txt"
    plain.write_bytes(("a fox\nand a dog\n\n" * 40).encode())
    path.write_bytes(("a fox\nand a dog\n\n" * 40).replace("\n", end).encode(mark))
    ours, theirs = load_text(str(path), seq_len=8), load_text(str(plain), seq_len=8)
    assert ours.tokenizer.vocabulary == theirs.tokenizer.vocabulary == "\n adfgnox" and ours.sha256 == theirs.sha256


def test_a_mark_inside_a_text_is_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("a\ufefffox" * 40, encoding="utf-8")
    assert "\ufeff" in load_text(str(tmp_path / "a.txt"), seq_len=8).tokenizer.vocabulary


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    content = FOX * 40
    (tmp_path / "a.txt").write_bytes(
        ("\ufeff" if encoding == "utf-16-be" else "").encode(encoding) + content.encode(encoding)
    )
    with pytest.raises(UsageError, match="UTF-16: save it as UTF-8"):
        load_text(str(tmp_path / "a.txt"), seq_len=8)


def test_a_text_of_one_character_teaches_nothing(small, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    code, _, err = small("--data", tmp_path / "a.txt", "--out", tmp_path / "run")
    assert code == 2 and "only of the token 'a': there is nothing to learn" in err and err.count("\n") == 1, err


def test_a_large_vocabulary_says_its_memory_before_the_training(cli, tmp_path):
    """20,000 different characters, of which each network has two tables of width 24, with four numbers per weight."""
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + i) for i in range(20_000)) * 2, encoding="utf-8")
    flags = (*QUICK, "--layers", "2", "--blocks", "1", "--samples", "0", "--steps", "1", "--eval-windows", "1")
    for name in ("gpt", "mdm"):
        code, out, err = cli(*flags, "--data", tmp_path / "a.txt", "--out", tmp_path / name, main=TEXTS[name][0])
        said = "20,000 different tokens: embedding and output projection of each network take "
        tables, logits = 2 * 20_000 * 24 * 16 / 2**20, 8 * 16 * 20_000 * 4 / 2**20
        said += f"{tables:.0f} MiB in training, the logits of a batch {logits:.0f} MiB"
        assert code == 0 and said in out and out.index(said) < out.index("step 1/1"), err


def test_a_text_of_one_byte_pair_teaches_nothing(tmp_path, monkeypatch):
    class Words:
        vocabulary, classes = "", 50257

        def encode(self, text):
            return [5] * (len(text) // 4)

        def decode(self, tokens):
            return " the" * len(tokens)

    monkeypatch.setattr("data.text.GPT2Tokenizer", Words)
    (tmp_path / "a.txt").write_text(" the" * 1000)
    with pytest.raises(UsageError, match="consists only of the token ' the'"):
        load_text(str(tmp_path / "a.txt"), "gpt2", seq_len=8)


def test_a_short_text_by_gpt2s_tokens_is_refused_in_one_line(tmp_path, monkeypatch):
    """The encoding is pretended: a token for every eight characters."""

    class Eighths:
        vocabulary, classes = "", 50257

        def encode(self, text):
            return [ord(text[i]) for i in range(0, len(text), 8)]

    monkeypatch.setattr("data.text.GPT2Tokenizer", Eighths)
    (tmp_path / "a.txt").write_text(FOX * 20)  # 900 characters, 90 of which are held out
    assert len(load_text(str(tmp_path / "a.txt"), "gpt2", seq_len=5).heldout) == 12
    with pytest.raises(UsageError, match="12 held-out tokens are too few for --seq-len 6, which needs 14"):
        load_text(
            str(tmp_path / "a.txt"), "gpt2", seq_len=6
        )  # with what follows them, 7 for validation and 7 to report
