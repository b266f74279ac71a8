import sys

import pytest
import torch

import train_gpt
from nano_db.settings import command

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other

# A run of a second: 4 blocks of a layer each on a file of a few thousand characters.
SMALL = [
    "--preset",
    "tiny",
    "--layers",
    "4",
    "--width",
    "16",
    "--seq-len",
    "8",
    "--steps",
    "12",
    "--sample-length",
    "5",
]
SMALL += ["--warmup", "2", "--log-every", "4", "--save-every", "5", "--device", "cpu"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 80)
    return str(path)


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("--blocks", "2", ...) runs train_gpt.py in this process: (exit code, stdout, stderr)."""

    def run(*flags, main=train_gpt.main):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *map(str, flags)])
        code = 0
        try:
            command(main)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def small(cli, text_file):
    """The same, with the settings and text of a run that takes a second."""
    return lambda *flags: cli(*SMALL, "--data", text_file, *flags)
