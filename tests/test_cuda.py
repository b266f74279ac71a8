"""Every script on a GPU, against the CPU: `python -m pytest tests/test_cuda.py` on a machine that has one.

In a run of all tests, and without a GPU, only bfloat16 against float32 on the CPU is tested.
"""

import json
import re

import pytest
import torch
from conftest import draw_glyphs_once
from torch.overrides import TorchFunctionMode

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from data import glyphs
from experiments.benchmark import script_and_settings
from nano_db.trainer.run import autocast, first_weights, networks, seed_from

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device, or this file was not asked for by its name"
)
SCRIPTS = {"dit": train_dit, "gpt": train_gpt, "looped": train_looped, "mdm": train_mdm, "vit": train_vit}
METHODS = {"blocks": (), "paper": ("--recipe", "paper"), "baseline": ("--baseline",)}
ALL = [(s, m) for s in SCRIPTS for m in METHODS if m != "paper" or s in ("gpt", "looped", "vit")]  # those with recipes
TINY = ("--preset", "tiny")


class DrawnOnCPU(TorchFunctionMode):
    """Draws all noise on the CPU and moves it: a GPU's generator gives other numbers for the same seed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.rand, torch.randn, torch.randint):
            device = kwargs.pop("device", None)
            return function(*args, **kwargs).to(device or "cpu")
        if function is torch.randn_like:
            (like,) = args
            return torch.randn(like.shape, dtype=like.dtype).to(like.device)
        return function(*args, **kwargs)


def losses(name, flags, device, dtype):
    """The loss of the first step of each block, whose weights, batch and noise are those of the CPU."""
    script, settings = script_and_settings(name, [*TINY, *flags, "--device", device, "--dtype", dtype])
    shared, found = script.prepare(settings), []
    for b in range(networks(settings)):
        block = first_weights(script.build, b, settings, *shared)
        for parameter in block.parameters():  # where new ones are zero, most of the network would not count
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(b)).to(device)
        seed_from(0, b, 0)
        with DrawnOnCPU(), autocast(settings):
            found.append(block.loss(*script.batch(settings.batch_size, settings, *shared)).item())
    return found


@pytest.mark.parametrize(
    "device, dtype, tolerance",
    [
        ("cpu", "bfloat16", 2e-2),
        pytest.param("cuda", "float32", 1e-4, marks=needs_cuda),
        pytest.param("cuda", "bfloat16", 2e-2, marks=needs_cuda),
    ],
)
@pytest.mark.parametrize("script, method", ALL)
def test_the_loss_of_a_step_is_that_of_the_cpu_in_float32(monkeypatch, script, method, device, dtype, tolerance):
    monkeypatch.setattr(glyphs, "make", draw_glyphs_once)
    expected = losses(script, METHODS[method], "cpu", "float32")
    found = losses(script, METHODS[method], device, dtype)
    assert found == pytest.approx(expected, rel=tolerance)
    assert (device, dtype) == ("cuda", "float32") or found != expected, "bfloat16 it is"


@needs_cuda
@pytest.mark.whole
@pytest.mark.parametrize("script, method", ALL)
@pytest.mark.parametrize("more", [("--dtype", "float32"), ("--compile",)], ids=["float32", "compiled"])
def test_a_tiny_run_on_a_gpu_reports_the_allocator(cli, tmp_path, script, method, more):
    if more == ("--compile",) and (script, method) == ("looped", "baseline"):
        pytest.skip("its recurrences change in number: it refuses to be compiled")
    flags = (*TINY, "--device", "cuda", "--out", tmp_path / "run", *METHODS[method], *more)
    code, _, err = cli(*flags, main=SCRIPTS[script].main)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"] == "cuda" and result["memory_bytes"]["allocator_peak"] > 0


@needs_cuda
@pytest.mark.parametrize("recipe", ["nano", "paper"])
def test_blocks_of_the_cpu_are_scored_on_a_gpu_as_there(small, cli, tmp_path, recipe):
    code, _, err = small("--recipe", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    expected = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    code, out, err = cli("--eval-only", "--device", "cuda", "--out", tmp_path / "run")
    assert code == 0, err
    (line,) = re.findall("nats by block: (.*)", out)
    shares = list(map(float, line.split()))
    assert shares == pytest.approx(expected["nats_per_block"], rel=1e-3, abs=1e-3 * expected["nats_per_token"])


@needs_cuda
def test_a_run_that_has_begun_on_the_cpu_goes_on_on_a_gpu_in_float32(small, tmp_path):
    assert small("--only", "0", "--out", tmp_path / "run")[0] == 0
    code, out, err = small("--out", tmp_path / "run", "--device", "cuda")
    assert code == 0 and "on cuda, float32:" in out, err
