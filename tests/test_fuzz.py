"""Everything that is read from outside, fed with seeded random mutations of sound input: it is read, or refused
in one line. Nothing else may come out, and nothing in it may run.
"""

import ast
import json
import random
import shutil
import string
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, SMALL
from test_run import build, make_run, train

import train_gpt
import train_mdm
from data import download, text8
from data.text import load_text
from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import read_block, read_metrics
from nano_db.trainer.settings import read_settings

JSON = [b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b'""', b"[]", b"{}", b"99999999", b'"\\ud800"', b"[" * 5000]


def mutate(content, rng, words=(b"\0", b"\xff\xff\xff\xff", b"PK\x03\x04", b"../../")):
    """One to three random changes: a bit, a byte, a piece cut out, doubled, moved, overwritten, or the end cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        j = min(j, i + 200)
        kind = rng.randrange(7)
        if kind == 0 and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[i:i] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del content[i:j]
        elif kind == 3:
            content[i:i] = content[i:j]
        elif kind == 4:
            content[i : i + 1] = rng.choice(words)
        elif kind == 5:
            content[i:j] = rng.randbytes(j - i)
        else:
            del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


# --- checkpoints ---


def half_trained(folder, **options):
    """A run of two blocks of 4 steps each, of which 2 are done; block 1 can go on from its file."""
    train(make_run(folder, steps=4, blocks=2, rounds=2, **options), rounds=1)
    return lambda folder: make_run(folder, steps=4, blocks=2, only="1", **options)


def test_mutated_bytes_of_a_checkpoint(tmp_path):
    half_trained(tmp_path, ema=0.9)
    path, rng, read = tmp_path / "block_1.pt", random.Random(1), 0
    content, sound = path.read_bytes(), read_block(path)
    for _ in range(400):
        path.write_bytes(mutate(content, rng))
        try:
            state = read_block(path)
        except UsageError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            read += 1
            assert state["step"] == sound["step"]
            assert all(torch.equal(state["weights"][name], sound["weights"][name]) for name in sound["weights"])
    assert read < 100


STRANGE = [None, True, -1, 3.5, float("nan"), "text", [], {}, {"x": torch.ones(2)}, torch.ones(3), (1, 2), 2**70]


def change_something(state, rng):
    """Replace, remove or add one entry, somewhere in nested dictionaries and lists."""
    places = []

    def collect(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(state)
    node, key = rng.choice(places)
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(STRANGE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using a non-tuple")
def test_checkpoints_with_sound_checksums_and_strange_content(tmp_path):
    """As a stranger might make them: they go on or are refused, in training and in evaluation."""
    rest = half_trained(tmp_path, ema=0.9)
    path, rng, refused = tmp_path / "block_1.pt", random.Random(2), 0
    for _ in range(300):
        state = torch.load(path, weights_only=True)
        change_something(state, rng)
        torch.save(state, tmp_path / "strange.pt")
        folder = shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
        (folder / "strange.pt").rename(folder / "block_1.pt")
        messages = []
        for use in (lambda run: run.trained_block(1, build), train):
            try:
                use(rest(folder))
            except UsageError as error:
                messages.append(str(error))
        refused += bool(messages)
        assert all("block_1.pt" in message or "block 1" in message for message in messages)
        shutil.rmtree(folder)
    assert refused > 150


@pytest.mark.parametrize("ema, content", [(0.0, {"x": torch.ones(2)}), (0.9, {"x": torch.ones(2)}), (0.9, None)])
def test_averages_that_are_not_the_runs(tmp_path, ema, content):
    """Where the run keeps none they count for nothing in training; where it does they must fit."""
    rest = half_trained(tmp_path, ema=ema)
    state = torch.load(tmp_path / "block_1.pt", weights_only=True)
    torch.save({**state, "ema": content}, tmp_path / "block_1.pt")
    if not ema:
        assert train(rest(tmp_path)) == [1]
        assert torch.load(tmp_path / "block_1.pt", weights_only=True)["ema"] is None
    else:
        with pytest.raises(UsageError, match=r"block_1\.pt does not fit"):
            train(rest(tmp_path))


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("place", ["weights", "optimizer", "settings", "step"])
def test_code_in_a_checkpoint_never_runs(tmp_path, place):
    rest = half_trained(tmp_path)
    path, target = tmp_path / "block_1.pt", tmp_path / "code ran"
    state = torch.load(path, weights_only=True)
    state[place] = {"x": Attack(str(target))} if place != "step" else Attack(str(target))
    torch.save(state, path)
    for read in (lambda: read_block(path), lambda: train(rest(tmp_path))):
        with pytest.raises(UsageError, match="damaged or not a nano_db block"):
            read()
    assert not target.exists()
    torch.load(path, weights_only=False)  # the attack is a real one
    assert target.exists()


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "block_0.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("block_0/data.pkl", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(UsageError, match="damaged or not a nano_db block"):
        read_block(path)


# --- config.json and metrics ---


def test_mutated_config_json(small, cli, tmp_path):
    run = tmp_path / "run"
    small("--out", run, "--only", "0")
    config, rng = run / "config.json", random.Random(3)
    content = config.read_bytes()

    def only_settings():
        read_settings("gpt", train_gpt.Settings, train_gpt.PRESETS, train_gpt.RECIPES)

    refused = 0
    for _ in range(400):
        config.write_bytes(mutate(content, rng, JSON))
        code, _, err = cli("--eval-only", "--out", run, main=only_settings)
        assert code == 0 or (code == 2 and err.count("\n") == 1), err
        refused += code == 2
    assert refused > 200


def test_every_setting_of_a_config_json_replaced(small, cli, tmp_path):
    run = tmp_path / "run"
    small("--out", run, "--only", "0")
    path = run / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in config["settings"]:
        for strange in (None, -1, 1e400, "text", []):
            path.write_text(json.dumps({**config, "settings": {**config["settings"], name: strange}}))
            code, _, err = small("--out", run, "--only", "0")
            assert (code == 0) or (code == 2 and err.count("\n") == 1), (name, strange, err)
            main = lambda: read_settings("gpt", train_gpt.Settings, train_gpt.PRESETS)  # noqa: E731
            code, _, err = cli("--eval-only", "--out", run, main=main)
            assert (code == 0) or (code == 2 and err.count("\n") == 1), (name, strange, err)


def test_mutated_metrics_cost_lines_at_most(small, tmp_path):
    small("--out", tmp_path / "run", "--only", "0")
    path, rng = tmp_path / "run" / "metrics_0.jsonl", random.Random(4)
    content, sound = path.read_bytes(), len(read_metrics(tmp_path / "run", "train"))
    for _ in range(200):
        path.write_bytes(mutate(content, rng, JSON))
        assert len(read_metrics(tmp_path / "run", "train")) <= 2 * sound


@pytest.mark.parametrize("line", ["", "{", "[" * 100_000, '{"kind": "train"}', *(
    f'{{"kind": "train", "step": {step}}}' for step in ("null", '"x"', "[]", "1e999", "-Infinity", "NaN")
)], ids=lambda line: line[:40])  # fmt: skip
def test_a_damaged_line_of_metrics_costs_that_line(tmp_path, line):
    (tmp_path / "metrics_0.jsonl").write_text(f'{line}\n{{"kind": "train", "step": 7}}\n', encoding="utf-8")
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [7]


# --- texts ---


def test_mutated_text8(tmp_path, monkeypatch):
    rng = random.Random(5)
    content = "".join(rng.choice(string.ascii_lowercase + " ") for _ in range(2000)).encode()
    with zipfile.ZipFile(tmp_path / "text8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", content)
    archive = (tmp_path / "text8.zip").read_bytes()
    sha256 = download.hashlib.sha256(archive).hexdigest()
    md5 = text8.hashlib.md5(content).hexdigest()
    for name, value in {"SIZE": 2000, "MD5": md5, "SHA256": sha256, "ZIP_SIZE": len(archive)}.items():
        monkeypatch.setattr(text8, name, value)
    assert text8.text(tmp_path)[0] == content.decode()
    for name, sound in (("text8.zip", archive), ("text8", content)):
        for _ in range(200):
            mutated = mutate(sound, rng)
            (tmp_path / name).write_bytes(mutated)
            try:
                assert text8.text(tmp_path)[0] == content.decode()
            except UsageError as error:
                assert mutated != sound and "\n" not in str(error)
        (tmp_path / name).unlink()
    (tmp_path / "text8").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        text8.text(tmp_path)


def test_mutated_texts_of_ones_own(tmp_path):
    rng, path = random.Random(6), tmp_path / "text.txt"
    content = ("the quick brown fox, Ä and 日本, jumps over the lazy dog. " * 10).encode()
    for _ in range(300):
        path.write_bytes(mutate(content, rng))
        try:
            text = load_text(str(path), seq_len=8)
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert text.tokenizer.decode(torch.cat([text.train, text.heldout]).tolist()) == path.read_bytes().decode()


def strange_texts(count):
    rng = random.Random(7)
    alphabets = [string.printable, "the quick▁", "\0\n\r\t\x1b", "Äß日本😀", "\udcff\ud800", "-_'\"{}%$"]
    for _ in range(count):
        letters = "".join(rng.sample(alphabets, rng.randint(1, 3)))
        yield "".join(rng.choice(letters) for _ in range(rng.choice([0, 1, 5, 15, 16, 17, 300])))


@pytest.mark.slow
@pytest.mark.parametrize("main, flag", [(train_gpt.main, "--prompt"), (train_mdm.main, "--fill")])
def test_strange_prompts_and_fills(small, cli, text_file, tmp_path, main, flag):
    cli(*SMALL, "--data", text_file, "--out", tmp_path / "run", main=main)  # `small` keeps the samples short
    codes = []
    for text in (*strange_texts(48), "the", "the dog", "the ▁▁"):
        code, out, err = cli(
            "--eval-only", "--eval-windows", "1", "--out", tmp_path / "run", f"{flag}={text}", main=main
        )
        assert (code == 0 and "bits per character" in out) or (code == 2 and err.count("\n") == 1), (text, err)
        codes.append(code)
    assert set(codes) == {0, 2}


def test_downloads_are_https_and_no_longer_than_announced(tmp_path, monkeypatch):
    class Answer:
        url, asked = "http://elsewhere/y", []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, size):
            self.asked.append(size)
            return b"x" * size  # it never ends

    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: Answer())
    monkeypatch.setattr(download, "PAUSE", 0)
    with pytest.raises(UsageError, match="not https"):
        download.fetch("https://x/y", tmp_path / "y", "0" * 64, 9)
    assert Answer.asked == []
    Answer.url = "https://elsewhere/y"
    with pytest.raises(UsageError, match="sha256"):
        download.fetch("https://x/y", tmp_path / "y", "0" * 64, 9)
    assert Answer.asked == [10, 0] * 3 and not list(tmp_path.iterdir())


# --- the code itself ---


def test_no_code_here_unpickles_evaluates_or_unpacks_what_it_reads():
    """A look at every call in the package, the experiments, the data readers and the scripts."""
    files = [path for folder in ("nano_db", "experiments", "data") for path in ROOT.glob(f"{folder}/**/*.py")]
    files += ROOT.glob("train_*.py")
    folders = {"nano_db", "trainer", "experiments", "gpu", "neighbours", "data", ROOT.name}
    assert len(files) > 20 and folders <= {path.parent.name for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                forbidden = {"pickle", "marshal", "shelve", "dill", "importlib", "runpy"}
                if path == ROOT / "experiments/benchmark.py":
                    forbidden.remove("importlib")  # of our scripts
                assert not names & forbidden, path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "http://" not in node.value.split("://")[0] + "://", path
            if isinstance(node, ast.Call):
                name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name not in ("eval", "exec", "compile", "__import__", "os.system"), path
                assert not name.endswith((".extract", ".extractall", ".unpack_archive")), path
                assert name != "torch.load" or keywords.get("weights_only") == "True", path
                assert keywords.get("allow_pickle", "False") == keywords.get("shell", "False") == "False", path


def test_what_is_read_is_not_verified_by_assert():
    """`python -O` would take it away. (The method asserts shapes, and reads nothing.)"""
    files = [path for folder in ("nano_db/trainer", "experiments", "data") for path in ROOT.glob(f"{folder}/**/*.py")]
    assert len(files) > 30
    for path in files:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        asserted = [node.lineno for node in nodes if isinstance(node, ast.Assert)]
        assert not asserted or path.name == "frechet.py", f"{path}:{asserted}"


@pytest.mark.slow
def test_without_asserts_damaged_files_are_refused_all_the_same(small, tmp_path):
    small("--out", tmp_path / "run", "--only", "0")
    (tmp_path / "run" / "block_0.pt").write_bytes(b"damaged")
    (tmp_path / "result.json").write_text("[]")
    for line, said in (
        (["train_gpt.py", *SMALL, "--data", tmp_path / "text.txt", "--out", tmp_path / "run"], "block_0.pt is damaged"),
        (["-m", "experiments.compare", tmp_path], "result.json is missing or damaged"),
    ):
        done = subprocess.run([sys.executable, "-O", *line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
