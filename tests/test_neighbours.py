import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiments import compare
from experiments.neighbours import forward_forward, greedy, noprop, noprop_network

TINY = ("--steps", "3", "--warmup", "1", "--batch-size", "8", "--glyphs", "180", "--device", "cpu")


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


# --- NoProp ---


def test_noprops_coefficients_are_those_of_bayes_rule():
    """q(z_t | z_{t-1}, u) of numbers on a grid: q(z_t | u) q(z_{t-1} | z_t), normalised."""
    before, after, u, z_before = 0.3, 0.7, 1.3, 0.4
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    alpha = before / after
    log_p = -((z - after**0.5 * u) ** 2) / (2 * (1 - after)) - (z_before - alpha**0.5 * z) ** 2 / (2 * (1 - alpha))
    p = log_p.softmax(0)
    mean = float((p * z).sum())
    a, b, c = noprop.posterior(before, after)
    assert a * u + b * z_before == pytest.approx(mean, abs=1e-6)
    assert c == pytest.approx(float((p * (z - mean) ** 2).sum()), abs=1e-6)


def test_the_schedule_rises_and_its_ends_are_cut_off():
    abar = noprop.cosine_schedule(10)
    assert len(abar) == 11 and abar == sorted(abar) and 0 < abar[0] < 0.01 and 0.99 < abar[-1] < 1


def test_the_first_levels_divergence_from_noise():
    u, abar = torch.randn(5, 3), 0.2
    q = torch.distributions.Normal(abar**0.5 * u, (1 - abar) ** 0.5)
    slow = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    assert noprop_network.kl_to_noise(u, abar) == pytest.approx(float(slow), rel=1e-5)


def make_dt(t=2, classes=5, d=4):
    torch.manual_seed(0)
    cnn, shared = noprop.CNN((1, 8, 8), d, classes, 2), noprop.Shared(classes, d)
    return noprop.DT(cnn, shared, noprop.cosine_schedule(3), t).eval()


def test_the_loss_of_a_dt_block_against_a_slow_reference():
    block, x, y = make_dt(), torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    torch.manual_seed(1)
    fast = block.loss(x, y)
    torch.manual_seed(1)
    total, abar, u = 0.0, block.abar, block.shared.u
    noise, last = torch.randn(6, 4), torch.randn(6, 4)
    weight = 3 * 0.1 / 2 * (abar[2] / (1 - abar[2]) - abar[1] / (1 - abar[1]))
    for i in range(6):
        z = abar[1] ** 0.5 * u[y[i]] + (1 - abar[1]) ** 0.5 * noise[i]
        p = block.cnn(x[i : i + 1], z[None]).softmax(-1)[0]
        guess = sum(p[k] * u[k] for k in range(5))
        total += weight * ((guess - u[y[i]]) ** 2).sum()
        logits = block.shared.out(abar[3] ** 0.5 * u[y[i]] + (1 - abar[3]) ** 0.5 * last[i])
        total -= logits.log_softmax(-1)[y[i]]
        total += noprop_network.kl_to_noise(u[y[i]][None], abar[0])
    assert fast.item() == pytest.approx(total.item() / 6, rel=1e-5)


def test_the_chain_of_dt_blocks_backpropagates_through_all_of_them():
    shared = make_dt().shared
    cnns = [noprop.CNN((1, 8, 8), 4, 5, 2) for _ in range(2)]
    abar = noprop.cosine_schedule(2)
    chain = noprop.Chain([noprop.DT(cnn, shared, abar, t + 1) for t, cnn in enumerate(cnns)])
    chain.loss(torch.randn(6, 1, 8, 8), torch.arange(6) % 5).backward()
    assert all(p.grad is not None for p in chain.parameters())


class Knows(nn.Module):
    """In place of the CNN, one that has been told the class (ct), or v (fm)."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def image(self, x):
        return x

    def forward(self, x, z, time, seen=None):
        return self.answer


def test_cts_equation_follows_the_noisy_label():
    """With the true u, dz/dt is the slope of z_t = sqrt(abar) u + sqrt(1 - abar) eps. In doubles, by differences."""
    shared = noprop.Shared(5, 4).double()
    ct = noprop.CT(Knows(None), shared, 1)
    eps, u, sure = torch.randn(1, 4).double(), shared.u[3:4], 100 * torch.eye(5).double()[3:4]

    def path(t):
        abar = torch.sigmoid(10 * t - 7)
        return abar.sqrt() * u + (1 - abar).sqrt() * eps

    for t in (torch.tensor([[0.2]]).double(), torch.tensor([[0.6]]).double()):
        slope = (path(t + 1e-5) - path(t - 1e-5)) / 2e-5
        assert torch.allclose(ct.velocity(path(t), sure, t), slope, atol=1e-6)


def test_fms_straight_path_ends_at_the_embedding():
    shared = noprop.Shared(5, 4)
    torch.manual_seed(7)
    start = torch.randn(2, 4)
    fm = noprop.FM(Knows(shared.u[[1, 3]] - start), shared, inference_steps=10)
    torch.manual_seed(7)
    assert torch.allclose(fm.scores(torch.zeros(2, 1)), shared.out(shared.u[[1, 3]]), atol=1e-5)


# --- Forward-Forward ---


def test_goodness_by_hand():
    dense = forward_forward.DenseLayer(4, 3)
    assert dense.goodness(torch.tensor([[1.0, 2.0, 0.0]])).item() == pytest.approx(10 * (5 / 3 - 1))
    tokens = torch.tensor([[[1.0, 4.0], [3.0, 0.0]]])  # their mean is (2, 2)
    assert forward_forward.AttentionLayer(8, 2).goodness(tokens).item() == 10 * (4 - 1)


def make_stages(network, classes=5):
    args = SimpleNamespace(network=network, layers=3, width=8, patch=4, heads=2)
    torch.manual_seed(0)
    return forward_forward.make_stages(args, (1, 8, 8), classes)


@pytest.mark.parametrize("network", ["mlp", "vit"])
def test_a_layers_loss_gives_no_gradient_to_the_layer_before(network):
    first, second, _ = make_stages(network)
    h = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    right = torch.tensor([1.0, 1.0, 0.0, 0.0])
    loss, h = first.judge(h, right)
    assert loss.item() == pytest.approx(F.softplus(-(2 * right - 1) * first.layer.goodness(h)).mean().item(), rel=1e-5)
    second.judge(h, right)[0].backward()
    assert all(p.grad is None for p in first.parameters())
    assert any(p.grad is not None and p.grad.any() for p in second.parameters())


@pytest.mark.parametrize("network", ["mlp", "vit"])
def test_a_layer_cannot_read_off_the_strength_of_the_one_before(network):
    stage, h = make_stages(network)[1], torch.rand(2, *((8,) if network == "mlp" else (5, 8)))
    assert torch.allclose(stage(h), stage(7 * h), atol=1e-4)


@pytest.mark.parametrize("network", ["mlp", "vit"])
def test_every_class_has_a_code_of_its_own(network):
    codes = make_stages(network)[0].embed.codes
    assert len(torch.unique(codes, dim=0)) == len(codes) == 5
    y = torch.arange(5).repeat(200)
    wrong = forward_forward.wrong_labels(y, 5)
    assert not (wrong == y).any() and len(torch.unique(wrong[y == 0])) == 4


def test_all_labels_are_tried():
    stages, x = make_stages("mlp"), torch.rand(3, 1, 8, 8)
    h = stages[1](stages[0]((x, torch.full((3,), 2))))
    expected = stages[1].layer.goodness(h) + stages[2].layer.goodness(stages[2](h))  # the first stage does not count
    assert torch.allclose(forward_forward.scores(stages, x, 5)[:, 2], expected)


# --- greedy ---


SMALL_VIT = ("--layers", "3", "--width", "16", "--heads", "2", "--patch", "16")


def test_greedy_blocks_pass_no_gradient(cli, tmp_path, monkeypatch):
    inputs, loss = [], greedy.GreedyBlock.loss
    monkeypatch.setattr(greedy.GreedyBlock, "loss", lambda block, h, y: inputs.append(h) or loss(block, h, y))
    code, _, err = cli(*TINY, *SMALL_VIT, "--out", tmp_path, main=greedy.main)
    assert code == 0, err
    assert {h.dim() for h in inputs} == {3, 4}, "images, and what the frozen blocks make of them"
    assert not any(h.requires_grad for h in inputs)


def test_layers_of_look_ahead_are_not_in_the_result(cli, tmp_path):
    results = []
    for n in (0, 5):
        code, _, err = cli(*TINY, *SMALL_VIT, "--look-ahead", n, "--out", tmp_path / str(n), main=greedy.main)
        assert code == 0, err
        results.append(result_of(tmp_path / str(n)))
    without, ahead = results
    assert ahead["parameters"] == without["parameters"]
    assert ahead["memory_bytes"]["activations"] > 2 * without["memory_bytes"]["activations"]
    assert len(ahead["metrics"]["accuracy_after_each_block"]) == 3
    assert ahead["metrics"]["accuracy"] == ahead["metrics"]["accuracy_after_each_block"][-1]


# --- all of them ---

SMALL_CNN = ("--channels", "2", "--blocks", "2", "--inference-steps", "3")


@pytest.mark.parametrize(
    "method, flags",
    [(noprop, ("--method", name, *SMALL_CNN)) for name in ("dt", "ct", "fm", "backprop", "blocks")]
    + [(forward_forward, ("--width", "16")), (forward_forward, ("--network", "vit", "--width", "16", "--patch", "16"))],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_tiny_run_leaves_a_result_that_compare_reads(cli, tmp_path, method, flags):
    code, _, err = cli(*TINY, *flags, "--out", tmp_path / "run", main=method.main)
    assert code == 0, err
    result = result_of(tmp_path / "run")
    assert 0 <= result["metrics"]["accuracy"] <= 1 and " ".join(flags) in result["command"]
    code, out, _ = cli(tmp_path / "run", main=compare.main)
    assert code == 0 and "accuracy" in out


def test_the_folder_of_a_run_is_refused(cli, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, _, err = cli(*TINY, "--out", tmp_path, main=greedy.main)
    assert code == 2 and "holds a run of a training script" in err and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "method, flags, message",
    [
        (noprop, ("--method", "bp"), "invalid choice"),
        (noprop, ("--blocks", "0"), "at least 1"),
        (noprop, ("--learning-rate", "nan"), "above 0"),
        (noprop, ("--batch-size", "one"), "invalid number value"),
        (noprop, ("--method", "dt", "--learning-rate", "1e30", "--channels", "2"), "smaller --learning-rate"),
        (forward_forward, ("--network", "vit", "--patch", "5"), "must divide"),
        (forward_forward, ("--network", "vit", "--width", "18"), "multiple of"),
        (greedy, ("--blocks", "7"), "too many for 6 layers"),
        (greedy, ("--out", "/dev/null/x"), "choose another --out"),
    ],
)
def test_bad_input_gets_one_clear_line(cli, tmp_path, method, flags, message):
    code, _, err = cli(*TINY, "--out", tmp_path / "run", *flags, main=method.main)
    assert code == 2 and message in err and err.count("\n") == 1, err
