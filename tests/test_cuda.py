"""Every script on a GPU, against the CPU: `python -m pytest tests/test_cuda.py` on a machine that has one.

In a run of all tests, and without a GPU, only bfloat16 against float32 on the CPU is tested. Speed, memory and the main
job are measured by `python -m experiments.gpu`.
"""

import json
import re

import pytest
import torch

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from experiments.gpu import works
from experiments.gpu.cases import Options

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device, or this file was not asked for by its name"
)
SCRIPTS = {"dit": train_dit, "gpt": train_gpt, "looped": train_looped, "mdm": train_mdm, "vit": train_vit}
METHODS = {"blocks": (), "paper": ("--recipe", "paper"), "baseline": ("--baseline",)}
ALL = [(s, m) for s in SCRIPTS for m in METHODS if m != "paper" or s in ("gpt", "looped", "vit")]  # those with recipes
TINY = ("--preset", "tiny")


def test_the_loss_of_a_step_in_bfloat16_is_near_that_in_float32(tmp_path):
    found = [works.judge(case, works.step_difference) for case in works.cases("cpu", ["bfloat16"], tmp_path)]
    assert len(found) == len(ALL) and all(record["passed"] for record in found), found


@needs_cuda
def test_all_checks_of_the_gpu_command_pass(tmp_path):
    found = works.run(Options("cuda", "tiny", minutes=9, out=tmp_path, scratch=tmp_path))
    assert [record for record in found if isinstance(record, dict) and record["passed"] is False] == []


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
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["device"] == "cuda" and result["memory_bytes"]["allocator_peak"] > 0


@needs_cuda
@pytest.mark.parametrize("recipe", ["nano", "paper"])
def test_blocks_of_the_cpu_are_scored_on_a_gpu_as_there(small, cli, tmp_path, recipe):
    code, _, err = small("--recipe", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    expected = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["metrics"]
    code, out, err = cli("--eval-only", "--device", "cuda", "--out", tmp_path / "run")
    assert code == 0, err
    (line,) = re.findall("nats per token, by block: (.*)", out)
    shares = list(map(float, line.split()))
    assert shares == pytest.approx(expected["nats_per_block"], rel=1e-3, abs=1e-3 * expected["nats_per_token"])
