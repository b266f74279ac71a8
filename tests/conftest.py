import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
from data.text import Text
from nano_db.trainer import plots, report
from nano_db.trainer.command import command

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other

# A run of a second: 4 blocks of a layer each on a file of a few thousand characters. It saves every 5 steps.
SMALL = ["--preset", "tiny", "--layers", "4", "--width", "16", "--seq-len", "8", "--steps", "12", "--warmup", "2"]
SMALL += ["--device", "cpu"]


def pytest_configure(config):
    """Hide GPUs, unless test_cuda.py is asked for by name: the tests are those of a CPU, and many fork this process,
    which the threads that PyTorch starts for a GPU do not survive.
    """
    if not any("test_cuda" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def tensors(folder, b):
    """All that block b's file says of its training, but for the seconds: weights, EMA, optimizer's state, step."""
    state = torch.load(Path(folder) / f"block_{b}.pt", weights_only=True)
    optimizer = [v for state in state["optimizer"]["state"].values() for v in state.values()]
    return [*state["weights"].values(), *(state["ema"] or {}).values(), *optimizer, torch.tensor(state["step"])]


def same(first, second):
    """Bit for bit."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _namespaces():
    """Whether Linux lets this user have mounts and a network of their own: how tests fill disks and count bytes."""
    try:
        return subprocess.run(["unshare", "-rmn", "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0
    except OSError:
        return False


def one_line(page):
    """A page's text without line breaks, which may divide a sentence."""
    return " ".join(page.read_text(encoding="utf-8").split())


def needs_fork():
    """Skip where processes cannot fork."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork, which Windows has not")


needs_namespaces = pytest.mark.skipif(not _namespaces(), reason="needs Linux and its user namespaces")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 80)
    return str(path)


@pytest.fixture
def cli(monkeypatch, capsys, request):
    """cli("--blocks", "2", ...) runs train_gpt.py in this process: (exit code, stdout, stderr). To draw its curves and
    to time a sample takes about as long as the run: that is left to tests of the mark `whole`.
    """
    if not request.node.get_closest_marker("whole"):
        monkeypatch.setattr(plots, "draw_curves", lambda *_: None)
        monkeypatch.setattr(report, "cost_of_use", lambda *_: {"layer_evaluations": 0, "seconds": 1.0, "weights": 0})

    def run(*flags, main=train_gpt.main):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, flags)])
        code = 0
        try:
            command(main)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


cost_of_use = report.cost_of_use


def cost_of_time(settings, work, *args):
    """In the place of report.seconds_of: nothing is done, and nothing timed."""
    return 1.0


@pytest.fixture
def real_costs(cli, monkeypatch):
    """For tests that look at what a sample costs in layers, but not in seconds."""
    monkeypatch.setattr(report, "cost_of_use", cost_of_use)
    monkeypatch.setattr(report, "seconds_of", cost_of_time)


@pytest.fixture
def small(cli, text_file, monkeypatch):
    """The same, with the settings and text of a run that takes a second; short samples, few sampling steps."""
    quick = {"sample_length": 5, "sampling_steps_per_block": 1}
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", {**train_gpt.PRESETS["tiny"], **quick})
    return lambda *flags: cli(*SMALL, "--data", text_file, *flags)


@pytest.fixture
def heldout_windows(monkeypatch):
    """Grows by a number for each batch of held-out text that is evaluated: its windows."""
    counts, batches = [], Text.heldout_batches

    def counted(*args, **options):
        for x, y in batches(*args, **options):
            counts.append(len(x))
            yield x, y

    monkeypatch.setattr(Text, "heldout_batches", counted)
    return counts
