import json

import pytest
import torch

import train_vit
from nano_db.partition import make_partition

TINY = ("--preset", "tiny", "--layers", "3", "--steps", "6", "--device", "cpu", "--glyphs", "180")


@pytest.fixture
def vit(cli, tmp_path):
    return lambda *flags: cli(*TINY, "--out", tmp_path / "run", *flags, main=train_vit.main)


def result_of(folder):
    return json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--recipe", "paper"),
        ("--baseline", "--ensemble", "2"),
        ("--pooling", "mean", "--head", "posterior", "--predict", "active"),
    ],
)
def test_a_run_scores_draws_and_resumes(vit, tmp_path, flags):
    code, _, err = vit(*flags)
    assert code == 0, err
    metrics = result_of(tmp_path)["metrics"]
    assert 0 <= metrics["accuracy"] <= 1
    if "--baseline" not in flags:
        assert len(metrics["accuracy_walk_after_each_block"]) == 3
        assert {"accuracy_walk", "accuracy_noise_free", "accuracy_mean_of_walks"} <= metrics.keys()
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = vit(*flags)
    assert code == 0 and "loss" not in out and result_of(tmp_path)["metrics"] == metrics


def test_with_uniform_edges_too_each_block_is_asked(vit, tmp_path, monkeypatch):
    """With equal probabilities of the whole range and one step per block, the last block would never be asked."""
    monkeypatch.setattr(
        train_vit, "make_partition", lambda noise, blocks, overlap: make_partition(noise, blocks, "uniform")
    )
    code, _, err = vit("--samples", "0")
    metrics = result_of(tmp_path)["metrics"]
    assert code == 0 and len(metrics["accuracy_walk_after_each_block"]) == 3, err
    assert len(metrics["accuracy_noise_free_after_each_block"]) == 3


def make_vit(sees_z):
    """With values in all weights, zero-initialised ones, too."""
    torch.manual_seed(0)
    vit = train_vit.ViT((1, 32, 32), train_vit.Settings(width=16, heads=2, patch=8), 2, sees_z)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


def test_a_network_that_is_shown_z_depends_on_it_and_on_the_noise_level():
    vit, x, z, c = make_vit(sees_z=True), torch.randn(3, 1, 32, 32), torch.randn(3, 16), torch.zeros(3)
    features = vit(x, z, c)
    assert features.shape == (3, 16)
    assert not torch.allclose(features, vit(x, z + 1, c)) and not torch.allclose(features, vit(x, z, c + 1))
    assert not torch.allclose(features, vit(x.flip(-1), z, c)), "patches know their place"


def test_a_trunk_reads_only_the_image_and_has_no_weights_for_noise():
    vit, x = make_vit(sees_z=False), torch.randn(3, 1, 32, 32)
    assert vit(x).shape == (3, 16) and not torch.allclose(vit(x), vit(x.flip(-1)))
    assert not [name for name, _ in vit.named_parameters() if "noise" in name or "z" in name or "modulation" in name]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--patch", "5"), "must divide"),
        (("--width", "18"), "multiple of 4"),
        (("--blocks", "4"), "4 blocks are too many for 3 layers"),
        (("--glyphs", "10"), "at least 100"),
        (("--data", "nowhere"), "does nothing with --data nowhere"),
        (("--head", "paper"), "--predict averaged needs --head denoising"),
        (("--head", "posterior"), "--predict averaged needs --head denoising"),
        (("--baseline", "--predict", "active"), "--predict does nothing with the baseline method"),
    ],
)
def test_bad_input_gets_one_clear_line(vit, flags, message):
    code, _, err = vit(*flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
