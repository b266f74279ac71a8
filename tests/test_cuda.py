"""Every script on a GPU: skipped where there is none."""

import json

import pytest
import torch

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("script", [train_gpt, train_mdm, train_looped, train_vit, train_dit])
@pytest.mark.parametrize("flags", [(), ("--recipe", "paper"), ("--baseline",), ("--dtype", "float32", "--compile")])
def test_a_tiny_run_on_a_gpu_reports_the_allocator(cli, tmp_path, script, flags):
    if "--recipe" in flags and not getattr(script, "RECIPES", None):
        pytest.skip("this script has one recipe")
    code, _, err = cli("--preset", "tiny", "--device", "cuda", "--out", tmp_path / "run", *flags, main=script.main)
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"] == "cuda" and result["memory_bytes"]["allocator_peak"] > 0
