import re
from pathlib import Path

import pytest
import torch

from data import pydocs, python_source, shakespeare
from data.text import CharTokenizer, GPT2Tokenizer, load_text
from nano_db.errors import UsageError

LOCAL_SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"


def test_pydocs_is_a_long_text_in_which_no_paragraph_stands_twice():
    text, train = pydocs.text()
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    assert len(text) > 250_000 and len(set(paragraphs)) == len(paragraphs)
    assert "try" in text and (text, train) == pydocs.text() and train == len(text) * 9 // 10


def library(folder, names, content="x = 1\n"):
    """A made-up standard library."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + f"# {name}\n", encoding="utf-8")


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """The folder of a standard library that a test fills."""
    monkeypatch.setattr(python_source.sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    monkeypatch.setattr(python_source, "text", python_source.text.__wrapped__)  # without its memory
    return tmp_path


def files_of(text):
    return set(re.findall(r"^# (\S+)$", text, re.MULTILINE))


def test_python_source_is_a_long_text_of_ascii_code():
    text, train = python_source.text()
    assert len(text) > 5_000_000 and text.isascii() and "\r" not in text
    assert 0.8 < train / len(text) < 0.97 and text.count("def ") > 10_000
    assert python_source.text() == (text, train)


def test_python_source_leaves_out_what_is_no_source_of_the_library(stdlib):
    kept = [f"module_{i}.py" for i in range(60)] + ["json/decoder.py", "email/mime/text.py", "testing.py"]
    left = [
        "test/test_os.py",
        "json/tests/a.py",
        "idlelib/idle_test/b.py",
        "encodings/cp1252.py",
        "pydoc_data/topics.py",
    ]
    left += ["turtledemo/clock.py", "site-packages/numpy/a.py", "dist-packages/b.py", "_sysconfigdata__linux_.py"]
    library(stdlib, [*kept, *left, "config-3.11-x86_64-linux-gnu/python-config.py", "readme.txt"])
    library(stdlib, ["foreign.py"], content="s = 'é'\n")
    assert files_of(python_source.text()[0]) == set(kept)


def test_held_out_source_is_of_other_files_and_another_version_moves_none(stdlib):
    library(stdlib, [f"module_{i}.py" for i in range(300)])
    text, train = python_source.text()
    sides = files_of(text[:train]), files_of(text[train:])
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 300 and 10 < len(sides[1]) < 60
    library(stdlib, [f"new_{i}.py" for i in range(100)])
    for i in range(0, 300, 3):
        (stdlib / f"module_{i}.py").unlink()
    text, train = python_source.text()
    later = files_of(text[:train]), files_of(text[train:])
    for before, after, other in zip(sides, later, reversed(later), strict=True):
        assert before & after and not before & other, "no file has changed its side"


def test_a_python_without_its_source_is_named(stdlib):
    with pytest.raises(UsageError, match="this Python has no source code of its library"):
        load_text("python")


def test_settings_are_chosen_by_one_half_of_the_held_out_text_and_the_other_is_reported():
    text = load_text("pydocs", seq_len=50)
    assert torch.equal(torch.cat([text.half("validation"), text.half("test")]), text.heldout)
    assert abs(len(text.half("validation")) - len(text.half("test"))) <= 1
    (x, _), *_ = text.heldout_batches(7, 50, half="test")
    assert torch.equal(x[0], text.half("test")[:50])


def test_the_split_is_ninety_to_ten_and_windows_stay_on_their_side():
    text = load_text("pydocs", seq_len=32)
    total = len(text.train) + len(text.heldout)
    assert len(text.train) == total * 9 // 10
    whole = torch.cat([text.train, text.heldout])
    assert text.tokenizer.decode(whole.tolist()) == pydocs.text()[0]
    x, y = text.batch(200, 32)
    assert x.shape == y.shape == (200, 32) and torch.equal(x[:, 1:], y[:, :-1])
    positions = text.train.unfold(0, 33, 1)  # all windows of the training side
    window = torch.cat([x[0], y[0, -1:]])
    assert (positions == window).all(1).any()


def test_heldout_windows_predict_each_token_once():
    text = load_text("pydocs", seq_len=50)
    targets = torch.cat([y.flatten() for _, y in text.heldout_batches(7, 50)])
    assert torch.equal(targets, text.heldout[1 : 1 + len(targets)])
    assert len(text.heldout) - 1 - len(targets) < 50


@pytest.mark.parametrize("windows, batches", [(1, [1]), (7, [7]), (10, [7, 3]), (10**6, None), (0, None)])
def test_as_many_windows_are_held_out_as_are_asked_for(windows, batches):
    text = load_text("pydocs", seq_len=50)
    found = list(text.heldout_batches(7, 50, windows=windows))
    if batches:
        assert [len(y) for _, y in found] == batches
    assert sum(len(y) for _, y in found) == min(windows or 10**6, (len(text.heldout) - 1) // 50)
    assert torch.equal(found[0][0][0], text.heldout[:50])


def test_a_few_windows_are_spread_over_the_whole_held_out_text():
    """The Python source is in files, of which the first windows would show one or two."""
    text = load_text("pydocs", seq_len=50)
    text.heldout = torch.arange(5 * 50 + 1)
    [(x, y)] = text.heldout_batches(7, 50, windows=2)
    assert x[:, 0].tolist() == [0, 100] and torch.equal(y, x + 1)
    [(x, _)] = text.heldout_batches(7, 50, windows=5)
    assert torch.equal(x.flatten(), torch.arange(250))


def test_the_last_training_token_can_be_drawn(tmp_path):
    (tmp_path / "t.txt").write_text("a" * 89 + "b" + "c" * 10)
    text = load_text(str(tmp_path / "t.txt"), seq_len=4)
    torch.manual_seed(0)
    _, y = text.batch(2000, 4)
    assert set(text.tokenizer.decode(y.flatten().tolist())) == {"a", "b"}


def test_characters_round_trip_and_unknown_ones_are_named():
    tokenizer = CharTokenizer("hello")
    assert tokenizer.decode(tokenizer.encode("hole")) == "hole" and tokenizer.classes == 4
    with pytest.raises(UsageError, match="'x' 'y'"):
        tokenizer.encode("yx")


def test_bits_per_character_count_characters_not_tokens(tmp_path):
    text = load_text("pydocs")
    text.characters_per_token = 4.0
    assert text.bits_per_character(4 * 0.6931471805599453) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "is empty"), (b"short", "too few"), (b"caf\xe9" * 1000, "save it as UTF-8"), (None, "No such file")],
)
def test_texts_that_cannot_serve_are_refused(tmp_path, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_text(str(path), seq_len=16)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(UsageError, match="Is a directory"):
        load_text(str(tmp_path))


def test_gpt2_without_network_says_what_to_do(tmp_path, monkeypatch):
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UsageError, match="TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


@pytest.mark.skipif(not LOCAL_SHAKESPEARE.exists(), reason="no local copy of Tiny Shakespeare")
def test_the_real_shakespeare_passes_its_checksum(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(LOCAL_SHAKESPEARE.read_bytes())
    text = load_text("shakespeare", folder=tmp_path)
    assert len(text.train) + len(text.heldout) == shakespeare.SIZE and text.tokenizer.classes == 65
