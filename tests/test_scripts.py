"""What the five scripts have in common, as they do it: gradients that are clipped, evaluations in the numbers of the
training and without dropout, losses with the weights that are asked for.
"""

import json
import sys
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit
from data.images import load_images
from data.text import load_text
from nano_db.block import DiffusionBlock
from nano_db.classify import score_images
from nano_db.heads import HEADS, make_target_embeddings
from nano_db.images import ImageStack
from nano_db.language import score_text
from nano_db.layers import Layer
from nano_db.partition import make_partition, sampling_grid, split_layers
from nano_db.schedule import LogNormal
from nano_db.stack import Stack
from nano_db.trainer.checkpoints import read_block, read_metrics
from nano_db.trainer.settings import read_settings

SCRIPTS = [train_dit, train_gpt, train_looped, train_mdm, train_vit]
in_all_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=attrgetter("__name__"))
IMAGES = ["--preset", "tiny", "--layers", "3", "--steps", "6", "--warmup", "2", "--device", "cpu"]
LOOPED = ["--preset", "tiny", "--width", "16", "--seq-len", "8", "--steps", "6", "--warmup", "2", "--device", "cpu"]
FEW = ["--eval-windows", "8"]  # of the held-out text


@pytest.fixture
def no_report(monkeypatch):
    """Leaves out what a run's end costs: training steps of all networks, to count bytes, and samples by the clock."""
    for script in SCRIPTS:
        monkeypatch.setattr(script, "report", lambda *_: None)


@pytest.fixture
def tiny(cli, text_file, tmp_path, monkeypatch):
    """tiny(script, *flags) runs a script in a second, in the folder `run`: (exit code, stdout, stderr)."""
    monkeypatch.setattr(train_looped, "K_VALUES", (1, 2))
    set_preset(monkeypatch, train_gpt, sample_length=5)

    def run(script, *flags):
        usual = {
            train_dit: [*IMAGES, "--sampling-steps", "3", "--frechet-images", "0"],
            train_vit: [*IMAGES, "--glyphs", "180"],
            train_looped: [*LOOPED, "--sampling-steps", "2", "--data", text_file, *FEW],
            train_mdm: [*SMALL, "--data", text_file, *FEW],
            train_gpt: [*SMALL, "--data", text_file, *FEW],
        }
        return cli(*usual[script], "--out", tmp_path / "run", *flags, main=script.main)

    return run


def set_preset(monkeypatch, script, **values):
    monkeypatch.setitem(script.PRESETS, "tiny", {**script.PRESETS["tiny"], **values})


@in_all_scripts
@pytest.mark.parametrize("more", [(), ("--baseline",)], ids=["blocks", "baseline"])
@pytest.mark.usefixtures("no_report")
def test_the_optimizer_sees_the_gradient_of_this_step_only_and_no_longer_than_the_clip(tiny, monkeypatch, script, more):
    set_preset(monkeypatch, script, clip=0.02)
    seen, make = [], script.make_optimizer

    def recorded(module, settings):
        optimizer, loss = make(module, settings), module.loss
        step = optimizer.step

        def looked_at_before(*batch):
            assert not any(p.grad.any() for p in module.parameters() if p.grad is not None), "of the step before"
            return loss(*batch)

        def look_and_step():
            seen.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm())
            step()

        module.loss, optimizer.step = looked_at_before, look_and_step
        return optimizer

    monkeypatch.setattr(script, "make_optimizer", recorded)
    only = () if script is train_looped or more else ("--only", "0")
    code, _, err = tiny(script, *more, *only, "--samples", "0")
    assert code == 0, err
    assert seen and max(seen) <= 0.02 * (1 + 1e-5), "clipped"
    assert max(seen) > 0.02 * 0.999, "and there was something to clip"


@in_all_scripts
@pytest.mark.usefixtures("no_report")
def test_an_evaluation_is_computed_as_training_is_and_without_dropout(tiny, monkeypatch, script):
    """Scores, samples and exports: of all forward passes that keep no graph, bfloat16 and no layer in training mode."""
    if script is not train_looped:
        set_preset(monkeypatch, script, dropout=0.5)
    seen, forward = [], Layer.forward

    def recorded(self, *given, **named):
        if not torch.is_grad_enabled():
            seen.append((torch.is_autocast_enabled("cpu"), self.training))
        return forward(self, *given, **named)

    monkeypatch.setattr(Layer, "forward", recorded)
    export = () if script is train_vit else ("--export", "2")
    code, _, err = tiny(script, "--dtype", "bfloat16", *export, "--samples", "2")
    assert code == 0 and len(seen) >= 3, err
    assert set(seen) == {(True, False)}


@pytest.mark.parametrize("script", [train_gpt, train_vit, train_looped], ids=attrgetter("__name__"))
@pytest.mark.usefixtures("no_report")
def test_a_weighted_loss_reaches_the_training(tiny, tmp_path, script):
    """EDM's weight is at least 1 / sigma_data^2 = 4. The first step has the same weights and noise either way."""
    logged, flags = [], ["--steps", "1", "--warmup", "1", "--samples", "0"]
    flags += [] if script is train_looped else ["--clean-weight", "0"]  # the clean term is not weighted
    for weight in ("none", "edm"):
        out = tmp_path / weight
        code, _, err = tiny(script, "--loss-weight", weight, *flags, "--out", out)
        assert code == 0, err
        logged.append({r["block"]: r["loss"] for r in read_metrics(out, "train")})
    none, edm = logged
    assert none.keys() == edm.keys() and all(edm[b] > 4 * none[b] for b in none)


def test_a_dit_trains_on_edms_weighted_error(tiny, tmp_path):
    """At the start F = 0, and the weighted error is near 1 at all noise levels. Without its weight that of the last
    block would be below sigma^2, 0.03.
    """
    code, _, err = tiny(train_dit, "--steps", "1", "--warmup", "1", "--samples", "0", "--sigma-data", "0.9")
    losses = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    assert code == 0 and len(losses) == 3 and all(0.3 < loss < 3 for loss in losses), err


@pytest.mark.parametrize(
    "script, owner, sampling", [(train_gpt, train_gpt, "generate"), (train_dit, ImageStack, "walk")]
)
@pytest.mark.usefixtures("no_report")
def test_with_uniform_edges_each_block_takes_equally_many_steps(tiny, monkeypatch, script, owner, sampling):
    """Where the intervals do not hold the same probability. (A ViT: test_train_vit.py.)"""
    sample, counts = getattr(owner, sampling), []

    def recorded(stack, *more):
        (sigmas,) = (value for value in more if torch.is_tensor(value) and value.dtype == torch.float64)
        counts.append(torch.bincount(stack.partition.route(sigmas[:-1])).tolist())
        return sample(stack, *more)

    monkeypatch.setattr(owner, sampling, recorded)
    more = ("--sampling-steps", "12") if script is train_dit else ("--noise", "paper")
    uniform = lambda noise, blocks, *_, overlap=0.0: make_partition(noise, blocks, "uniform", overlap)  # noqa: E731
    monkeypatch.setattr(script, "make_partition", uniform)
    code, _, err = tiny(script, "--samples", "1", *more)
    assert code == 0 and counts, err
    assert all(found == [4] * len(found) and len(found) >= 3 for found in counts)


@pytest.mark.parametrize("script", [train_dit, train_gpt, train_mdm, train_vit], ids=attrgetter("__name__"))
def test_layers_that_cannot_be_split_are_refused_before_there_is_a_folder(tiny, tmp_path, script):
    """Else the same command with the number corrected would meet a run of other settings there."""
    code, _, err = tiny(script, "--blocks", "3", "--layers", "2")
    assert code == 2 and "3 blocks are too many for 2 layers" in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


# --- the headline recipe ---


def settings_of(monkeypatch, script, out):
    monkeypatch.setattr(sys, "argv", ["train.py", "--eval-only", "--out", str(out)])
    return read_settings(script.__name__[6:], script.Settings, script.PRESETS, script.RECIPES)


def stack_by_hand(settings, out, classes, make_network, noise, average):
    """The blocks of a finished run, read from their files without the help of the script."""
    target_embeddings = make_target_embeddings(classes, settings.width, settings.seed)
    partition, blocks = make_partition(noise, settings.blocks), []
    for b, layers in enumerate(split_layers(settings.layers, settings.blocks)):
        span = make_partition(noise, settings.blocks, overlap=settings.overlap).training_range(b)
        block = DiffusionBlock(make_network(layers), HEADS[settings.head](target_embeddings), noise, span)
        block.load_state_dict(read_block(out / f"block_{b}.pt")["weights"])
        blocks.append(block.eval())
    return Stack(blocks, partition, average), sampling_grid(partition, settings.sampling_steps_per_block * len(blocks))


def metrics_of(out):
    return json.loads((out / "result.json").read_text(encoding="utf-8"))["metrics"]


@pytest.mark.parametrize("predict", ["averaged", "active"])
def test_a_gpt_is_scored_by_the_prediction_that_is_asked_for(tiny, tmp_path, text_file, monkeypatch, predict):
    """All blocks so far or only the active one, by default the former; in evaluation mode."""
    set_preset(monkeypatch, train_gpt, dropout=0.5)
    flags = ("--samples", "0", "--learning-rate", "0.03", *(("--predict", "active") if predict == "active" else ()))
    code, _, err = tiny(train_gpt, *flags)
    assert code == 0, err
    out, text = tmp_path / "run", load_text(text_file, seq_len=8)
    settings, classes = settings_of(monkeypatch, train_gpt, out), text.tokenizer.classes
    bits = {}
    for name in ("averaged", "active"):
        make = lambda layers: train_gpt.GPT(classes, settings, layers)  # noqa: E731
        stack, _ = stack_by_hand(settings, out, classes, make, train_gpt.NOISE["nano"], name == "averaged")
        bits[name] = score_text(stack, text, 8, 8, settings.seed)["bits_per_char"]
    assert metrics_of(out)["bits_per_char"] == pytest.approx(bits[predict], rel=1e-5)
    assert abs(bits["averaged"] / bits["active"] - 1) > 1e-3, "and the test can tell"


@pytest.mark.parametrize("predict", ["averaged", "active"])
def test_a_vit_is_scored_by_the_prediction_that_is_asked_for(tiny, tmp_path, monkeypatch, predict):
    set_preset(monkeypatch, train_vit, dropout=0.5)
    scored = SimpleNamespace(log_p=None)

    def score(*arguments):
        metrics, scored.log_p, labels = score_images(*arguments)
        return metrics, scored.log_p, labels

    monkeypatch.setattr(train_vit, "score_images", score)
    flags = ("--samples", "0", "--learning-rate", "0.03", *(("--predict", "active") if predict == "active" else ()))
    code, _, err = tiny(train_vit, *flags)
    assert code == 0, err
    out, images = tmp_path / "run", load_images("glyphs", count=180)
    settings, log_p = settings_of(monkeypatch, train_vit, out), {}
    for name in ("averaged", "active"):
        make = lambda layers: train_vit.ViT(images.shape, settings, layers)  # noqa: E731
        noise, average = train_vit.NOISE["nano"], name == "averaged"
        stack, grid = stack_by_hand(settings, out, len(images.classes), make, noise, average)
        _, log_p[name], _ = score_images(stack, images.test_batches(256), grid, settings.walks, settings.seed)
    torch.testing.assert_close(scored.log_p, log_p[predict])
    assert (log_p["averaged"] - log_p["active"]).abs().max() > 1e-3, "and the test can tell"


@pytest.mark.parametrize("script", [train_gpt, train_looped, train_vit], ids=attrgetter("__name__"))
@pytest.mark.usefixtures("no_report")
def test_a_run_of_other_noise_levels_is_refused_though_the_ends_are_the_same(tiny, monkeypatch, script):
    """Whoever edits NOISE in a script trains other networks, in one block, too, where no edge tells."""
    flags = () if script is train_looped else ("--blocks", "1")
    assert tiny(script, *flags, "--samples", "0")[0] == 0
    usual = script.NOISE["nano"]
    edited = LogNormal(usual.p_mean - 1, usual.p_std, usual.sigma_min, usual.sigma_max)
    monkeypatch.setitem(script.NOISE, "nano", edited)
    code, _, err = tiny(script, *flags, "--samples", "0")
    assert code == 2 and f"p_mean {usual.p_mean} there, {edited.p_mean} here" in err and err.count("\n") == 1, err


def test_a_run_of_another_preset_says_so_first(tiny):
    assert tiny(train_gpt, "--samples", "0", "--only", "0")[0] == 0
    code, _, err = tiny(train_gpt, "--samples", "0", "--only", "0", "--preset", "gpu")
    assert code == 2 and "(preset 'tiny' there, 'gpu' here)" in err and err.count("\n") == 1, err
    assert "resume that run with its own preset (--preset tiny)" in err and "--data" not in err, err


def test_of_another_number_of_blocks_the_number_is_told_and_not_the_edges_too(tiny):
    assert tiny(train_gpt, "--samples", "0", "--only", "0", "--blocks", "3")[0] == 0
    code, _, err = tiny(train_gpt, "--samples", "0", "--only", "0", "--blocks", "2")
    assert code == 2 and "(blocks 3 there, 2 here)" in err, err
