"""README and docs: commands run, or have flags that exist; minutes are those of the records; links lead somewhere."""

import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import statistics
import sys

import numpy as np
import pytest
from conftest import ROOT, one_line

from nano_db.trainer.plots import plt

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy
# In the order in which a reader would type: a later page uses what an earlier one has trained.
FIRST = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("running.md", "your-own-data.md"))]
PAGES = [*FIRST, *sorted({p for room in ("docs", "notebooks", "tests") for p in (ROOT / room).glob("*.md")} - {*FIRST})]
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))]
LOCAL = sorted({(str(page.relative_to(ROOT)), link) for page, link in LINKS if not link.startswith("https://")})
TINY = {  # what makes a command short
    "train_": "--preset tiny --steps 2 --warmup 0 --rounds 1",
    "experiments.benchmark": "--preset tiny --pairs 1",
    "experiments.neighbours": "--steps 2 --glyphs 200 --test-images 50",
}
# Not run: what downloads, needs a GPU or several machines, or takes an afternoon (other tests run these, smaller).
ELSEWHERE = re.compile(r"cifar|text8|ulimit|torchrun|srun|pytest|experiments\.(gpu|results --jobs)")


def in_blocks(page):
    """The command lines of a page's fenced blocks."""
    blocks = re.findall(r"^```(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [
        line
        for block in blocks
        for line in block.splitlines()[1:]
        if re.search(r"python (-m|[\w/]+\.py)|^torchrun", line)
    ]


def in_text(text):
    """The commands that stand between backticks; they may be broken into lines."""
    return re.findall(r"`(python (?:-m |[\w/]+\.py)[^`]*)`", " ".join(text.split()))


def arguments(line):
    """What follows `python` in a line, up to its comment: (["train_gpt.py"] or ["-m", "experiments.plan"], flags)."""
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    target = 1 + (words[start] == "-m")
    return words[start : start + target], words[start + target :]


def run(target, flags):
    """Run a command in this process, as `python` would: (its exit code, what it printed)."""
    printed, before = io.StringIO(), sys.argv
    code = 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if target[0] == "-m":
                sys.argv = [target[1], *flags]
                runpy.run_module(target[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = [target[0], *flags]
                runpy.run_path(str(ROOT / target[0]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
        plt.close("all")
    return code, printed.getvalue()


def commands():
    """{(target, flags): the page that names them}, of all pages and of what the scripts say of themselves."""
    found = {}
    for path in (*PAGES, *sorted(ROOT.glob("train_*.py"))):
        text = path.read_text(encoding="utf-8")
        lines = (
            [*in_blocks(path), *in_text(text)] if path.suffix == ".md" else re.findall(r"^    (python .*)$", text, re.M)
        )
        for line in lines:
            if "pytest" not in line:
                found[tuple(map(tuple, arguments(line)))] = path.name
    return found


@functools.cache
def help_of(target):
    return run(target, ["--help"])[1]


def test_the_flags_of_every_command_exist():
    unknown = []
    for (target, flags), page in commands().items():
        known = help_of(target)
        for argument in flags:  # `experiments.plan gpt` takes the flags of train_gpt.py as well
            script = (f"train_{argument}.py",)
            if target[0] == "-m" and (ROOT / script[0]).exists():
                known += help_of(script)
        assert "--help" in known, target
        names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
        unknown += [(page, *target, name) for name in names if not re.search(rf"(?<!\S){name}(?![\w-])", known)]
    assert not unknown
    assert len({target for target, _ in commands()}) > 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_flags_that_stand_alone_in_a_text_exist(page):
    """In any of the commands; others are pip's, torchrun's and fidelity's, and those that a table says are gone."""
    others = {"--index-url", "--no-deps", "--nproc-per-node", "--gpu", "--cpu"}
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^Some flags of earlier versions.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
    named = {flag for code in re.findall(r"`[^`]*`", text) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    known = " ".join(help_of(target) for target, _ in commands())
    assert {flag for flag in named - others if not re.search(rf"{flag}(?![\w-])", known)} == set()


@pytest.mark.slow
@pytest.mark.whole
def test_the_command_blocks_run_in_the_order_of_the_pages(tmp_path, monkeypatch):
    """In one folder, small: a later command finds what an earlier one has trained."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for folder in ("pictures", "FOLDER"):
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(12):
                plt.imsave(tmp_path / folder / name / f"{i}.png", random.random((32, 32, 3)))
    (tmp_path / "mine.txt").write_text("The sun rises over the hill, and the dog barks at the cat.\n" * 200)
    ran = 0
    for page in PAGES:
        for line in in_blocks(page):
            if ELSEWHERE.search(line):
                continue
            target, flags = arguments(line)
            if "--eval-only" not in flags:
                flags = [*flags, *next((TINY[name].split() for name in TINY if target[-1].startswith(name)), [])]
            code, printed = run(target, flags)
            assert code == 0, f"{page.name}: {line}\n{printed}"
            ran += 1
    assert ran > 20
    assert {"gpt-blocks", "gpt-four", "dit-converted", "my-vit", "mine"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize(
    "path, runs",
    [("README.md", "gpt-blocks"), ("train_gpt.py", "gpt-blocks"), ("experiments/results.py", "*-blocks")],
)
def test_minutes_are_those_of_the_records(path, runs):
    """Within a factor of two: computers differ by more. (The README's table of commands is made from the records.)"""
    records = [json.loads(file.read_text()) for file in (ROOT / "results" / "laptop").glob(f"{runs}-s*.json")]
    seconds = [r["result"]["seconds_per_step_all_blocks"] * r["settings"]["steps"] for r in records]
    (claim,) = re.findall(r"(\w+) minutes on one (?:CPU )?core", one_line(ROOT / path))
    assert 0.5 < float({"ten": 10, "eight": 8}.get(claim, claim)) / (statistics.median(seconds) / 60) < 2


@pytest.mark.parametrize("page, link", LOCAL)
def test_local_links_lead_somewhere(page, link):
    name, _, anchor = link.partition("#")
    there = (ROOT / page).parent / name if name else ROOT / page
    assert there.exists()
    if anchor:  # as GitHub makes it of a heading
        headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_pages_are_short_enough_to_be_read():
    lengths = {page: len(page.read_text(encoding="utf-8")) for page in PAGES}
    assert lengths.pop(ROOT / "README.md") <= 8_000 and max(lengths.values()) <= 16_000


def test_what_machines_gain_on_paper_is_the_arithmetic_that_the_page_describes():
    """In closed form: 12 width^2 weights per layer, 2.5 width^2 in a denoising head, two tables of GPT-2's tokens."""
    width, layers, blocks, table = 768, 12, 4, 50_257 * 768
    whole = 12 * layers * width**2
    block, thin = (whole / count + 2.5 * width**2 for count in (blocks, layers))  # thin: of one layer

    def step(weights):  # seconds: 256 x 256 tokens; the embedding is not multiplied
        return 6 * (weights + table) * 256 * 256 / 1e14

    def hours(seconds):
        return 100_000 * seconds / 3600

    def row(bits_per_second):  # data parallel on as many machines as blocks
        sent = 2 * 4 * (whole + 2 * table) * (blocks - 1) / blocks / (bits_per_second / 8)
        computed = step(whole) / blocks
        low, high = hours(max(computed, sent)), hours(computed + sent)
        return f"| {computed:.2f} + {sent:.2f} to send | {low:.{int(low < 10)}f} to {high:.{int(low < 10)}f} |"

    def most(weights):  # machines, until sending takes longer at 400 Gbit/s
        return int(1 + step(weights) * 400e9 / 8 / (2 * 4 * (weights + 2 * table)))

    page = one_line(ROOT / "docs" / "machines.md")
    gigabytes = (f"{16 * (weights + 2 * table) / 1e9:.1f} GB" for weights in (whole, block))
    for line in (
        f"weights in layers and head | {whole / 1e6:.0f} M | {block / 1e6:.0f} M |",
        f"weights in embedding and output projection | {2 * table / 1e6:.0f} M | {2 * table / 1e6:.0f} M |",
        f"AdamW's averages (16 per weight) | {' | '.join(gigabytes)} |",
        f"| {step(whole):.2f} | {hours(step(whole)):.1f} |",
        f"10 Gbit/s between them {row(10e9)}",
        f"the same, 400 Gbit/s {row(400e9)}",
        f"| 4 x {step(block):.2f} | {hours(4 * step(block)):.0f} |",
        f"| {step(block):.2f} | **{hours(step(block)):.1f}** |",
        f"can use a group of {most(block)} machines",
        f"without blocks can use {most(whole)}.",
        f"could use {most(thin)} machines each, {most(thin) * layers} in all",
    ):
        assert line in page
    share = (block + 2 * table) / (whole + 2 * table)
    assert f"still holds {share:.0%} of the bytes" in one_line(ROOT / "docs" / "gpu.md")
