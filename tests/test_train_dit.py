import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from test_memory import PeakBytes

import train_dit
from nano_db.block import DiffusionBlock
from nano_db.heads import EDMHead
from nano_db.images import ImageStack
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal
from nano_db.trainer.run import OneAtATime, Run

TINY = ("--preset", "tiny", "--layers", "3", "--steps", "6", "--device", "cpu", "--sampling-steps", "6")


@pytest.fixture
def dit(cli, tmp_path):
    return lambda *flags: cli(*TINY, "--out", tmp_path / "run", *flags, main=train_dit.main)


def result_of(folder):
    return json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--ema", "0.9"), marks=pytest.mark.whole),
        ("--baseline",),
        pytest.param(("--baseline", "--ensemble", "2"), marks=pytest.mark.slow),
        ("--partition", "uniform", "--layer-split", "1,1,1", "--frechet-images", "0"),
    ],
)
def test_a_run_scores_samples_and_resumes(dit, tmp_path, flags):
    code, out, err = dit(*flags)
    assert code == 0, err
    result = result_of(tmp_path)
    metrics = result["metrics"]
    assert sum(metrics["edm_loss_by_block"]) == pytest.approx(metrics["edm_loss"])
    assert ("frechet_small" in metrics) == ("--frechet-images" not in flags)
    assert ("(real images:" in out) == ("--frechet-images" not in flags), "never without its floor"
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = dit(*flags)
    assert code == 0 and "loss 0" not in out and result_of(tmp_path)["metrics"] == metrics


@pytest.mark.usefixtures("real_costs")
def test_three_blocks_evaluate_a_third_of_the_layers(dit, tmp_path):
    quick = ("--frechet-images", "0", "--samples", "0")
    dit("--guidance", "1", *quick)
    assert result_of(tmp_path)["one_sample"]["layer_evaluations"] == 6 * 1  # steps, layers per block
    for networks in (1, 2):
        out = tmp_path / str(networks)
        dit("--baseline", "--ensemble", networks, "--guidance", "2", *quick, "--out", out / "run")
        assert result_of(out)["one_sample"]["layer_evaluations"] == 6 * 3 * 2 * networks


def test_sampled_images_can_be_exported(dit, tmp_path):
    code, _, err = dit("--frechet-images", "0", "--samples", "0", "--export", "3", "--rounds", "2")
    assert code == 0, err  # sampled only after the last round
    paths = sorted((tmp_path / "run" / "images").iterdir())
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    assert plt.imread(paths[1]).shape[:2] == (32, 32)
    code, _, err = dit("--frechet-images", "0", "--samples", "0", "--export", "2")
    assert code == 2 and "holds images already" in err and len(list((tmp_path / "run" / "images").iterdir())) == 3
    code, out, err = dit("--export", "2")
    assert code == 2 and "EDM loss" not in out, "it is refused at once, not after all has been evaluated"


def test_a_run_that_has_exported_can_be_sampled_again(dit, cli, tmp_path):
    """As the script's own documentation says."""
    assert dit("--frechet-images", "0", "--samples", "2", "--export", "3")[0] == 0
    code, out, err = cli("--eval-only", "--guidance", "1", "--out", tmp_path / "run", main=train_dit.main)
    assert code == 0 and "samples-again.png" in out and len(list((tmp_path / "run" / "images").iterdir())) == 3, err


def test_an_eval_only_run_that_samples_nothing_refuses_to_be_told_how(dit, cli, tmp_path):
    assert dit("--frechet-images", "0", "--samples", "0", "--guidance", "1")[0] == 0  # a sample's cost depends on it
    evaluate = ("--eval-only", "--out", tmp_path / "run")
    for flag in ("--guidance", "--sampling-steps"):
        code, _, err = cli(*evaluate, flag, "9", main=train_dit.main)
        assert code == 2 and f"{flag} does nothing with --samples 0 --frechet-images 0" in err and err.count("\n") == 1
    code, _, err = cli(*evaluate, "--sampling-steps", "9", "--export", "1", main=train_dit.main)
    assert code == 0, err


def test_the_ema_is_what_is_evaluated(dit, tmp_path):
    flags = ("--ema", "0.5", "--frechet-images", "0", "--samples", "0")
    dit(*flags)
    state = torch.load(tmp_path / "run" / "block_1.pt", weights_only=True)
    assert any(not torch.equal(state["ema"][name], state["weights"][name]) for name in state["weights"])
    before = result_of(tmp_path)["metrics"]["edm_loss"]
    state["ema"] = state["weights"]
    torch.save(state, tmp_path / "run" / "block_1.pt")
    dit(*flags)
    assert result_of(tmp_path)["metrics"]["edm_loss"] != before


def test_only_one_block_is_in_memory_at_a_time():
    class Run:
        count, built = 3, []

        def trained_block(self, b, build, *shared):
            self.built.append(b)
            return build(b, *shared)

    blocks = OneAtATime(Run(), "block {} of {}".format, "the run")
    assert [blocks[b] for b in (0, 0, 1, 1, 1, 2)] == [f"block {b} of the run" for b in (0, 0, 1, 1, 1, 2)]
    assert Run.built == [0, 1, 2] and len(blocks) == 3
    assert list(blocks) == [f"block {b} of the run" for b in range(3)]


def test_nor_do_copies_in_bfloat16_of_earlier_blocks_stay_in_memory():
    """Autocast keeps a copy of each weight that it has cast, until it ends."""
    run = SimpleNamespace(count=2, trained_block=lambda b, build: torch.nn.Linear(500, 500, bias=False))
    blocks, x, held = OneAtATime(run, None), torch.randn(1, 500), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), PeakBytes() as tensors:
        for b in (0, 1, 0, 1):
            blocks[b](x)
            held.append(tensors.now)
    assert max(held) < 1.5 * held[0], "the copies of one block, however many have been asked"
    assert tensors.peak < 1.2 * held[0], "and a block is freed before the next one is read"


def test_a_block_is_read_once_for_all_images_that_are_sampled(dit, tmp_path, monkeypatch):
    loads, trained_block = [], Run.trained_block

    def recorded(run, b, *builder):
        loads.append(b)
        return trained_block(run, b, *builder)

    monkeypatch.setattr(Run, "trained_block", recorded)
    monkeypatch.setattr("nano_db.images.TOGETHER", 10)
    code, _, err = dit("--samples", "0", "--ema", "0.5")
    assert code == 0, err
    assert loads == [0, 1, 2, 0, 1, 2]  # once for the held-out loss, once for the 66 images of frechet_small


def test_a_share_of_the_labels_is_dropped_in_the_batch_and_nowhere_else(dit, tmp_path, monkeypatch):
    torch.manual_seed(0)
    labels, pixels = torch.arange(1000) % 10, torch.randn(1000, 1, 32, 32)
    images = SimpleNamespace(batch=lambda size, augment, device: (pixels[:size], labels[:size]), classes="0123456789")
    settings = train_dit.Settings(width=16, heads=2, patch=8, device="cpu", label_dropout=0.3)
    dropped, y = train_dit.batch(1000, settings, images, None)
    assert 250 < (dropped == 10).sum() < 350 and ((dropped == 10) | (dropped == labels)).all()
    assert torch.equal(y, pixels)

    network, seen = train_dit.DiT((1, 32, 32), 10, settings, 1), []
    network.label_embedding.register_forward_hook(lambda module, given, result: seen.extend(given[0].tolist()))
    block = DiffusionBlock(network, EDMHead(0.5), LogNormal(), (0.002, 80.0))
    block.train().loss(labels, pixels)
    assert seen == labels.tolist(), "a network draws nothing: checkpointed or not, it sees the same labels"

    loss, told = DiffusionBlock.loss, []
    monkeypatch.setattr(DiffusionBlock, "loss", lambda self, x, y: told.extend(x.tolist()) or loss(self, x, y))
    code, _, err = dit("--batch-size", "64", "--only", "0")
    null = max(told)
    assert code == 0 and 0.03 < sum(label == null for label in told) / len(told) < 0.2, err


def test_an_untrained_network_answers_c_skip_z():
    settings = train_dit.Settings(width=16, heads=2, patch=8)
    network = train_dit.DiT((3, 32, 32), 10, settings, 2)
    assert not network(torch.tensor([1]), torch.randn(1, 3, 32, 32), torch.zeros(1)).any()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--patch", "5"), "must divide"),
        (("--frechet-images", "20"), "more than 64"),
        (("--frechet-images", "300"), "at most half"),
        (("--recipe", "nano"), "unrecognized"),
        (("--sampling-steps", "0"), "at least 1"),
        (("--sampling-steps", "2"), "2 sampling steps: each of the 3 blocks needs at least one"),
        (("--width", "18"), "multiple of 4"),
        (("--p-mean", "50"), "next to no probability"),
        (("--layer-split", "1,1"), "must be 3 whole numbers above 0, which add up to 3 layers"),
        (("--baseline", "--partition", "uniform"), "--partition does nothing with the baseline method"),
    ],
)
def test_bad_input_gets_one_clear_line(dit, tmp_path, flags, message):
    code, _, err = dit(*flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("run/*.pt")), "nothing is trained before"


def test_the_baseline_uses_the_noise_levels(dit, tmp_path):
    code, _, err = dit("--baseline", "--p-mean", "0.5", "--sigma-data", "0.9", "--frechet-images", "0")
    assert code == 0, err


def test_across_batches_images_are_of_each_class_in_turn(monkeypatch):
    sizes = []

    def block(labels, z, sigma):
        """Its images say which class they are of."""
        sizes.append(len(labels))
        return (labels / 10).view(-1, 1, 1, 1).expand_as(z)

    monkeypatch.setattr("nano_db.images.TOGETHER", 4)
    settings = train_dit.Settings(device="cpu", sampling_steps=2, guidance=1.0)
    stack = ImageStack([block], make_partition(LogNormal(), 1), (1, 2, 2), 3)
    images = train_dit.sample_images(stack, 10, settings)
    assert images.shape == (10, 1, 2, 2) and sizes == [4, 4, 2] * 2
    assert images[:, 0, 0, 0].mul(10).round().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
