import pytest
import torch
import torch.nn as nn

import train_dit
import train_gpt
import train_vit
from data.images import NOISE_LEVELS
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.heads import DenoisingHead, EDMHead, PaperHead, PosteriorHead, make_target_embeddings
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal, edm_coefficients, edm_weight, sample_sigma

NOISE = LogNormal(0.3, 0.8, 0.05, 20.0)


class Echo(nn.Module):
    """A network that records what it is shown and answers with constant features."""

    def __init__(self, width):
        super().__init__()
        self.features = nn.Parameter(torch.randn(width))

    def forward(self, x, *shown):
        self.seen = shown
        return self.features.expand(*x.shape, -1)


def make(head=PosteriorHead, **options):
    torch.manual_seed(0)
    target_embeddings = make_target_embeddings(6, 8)
    return DiffusionBlock(Echo(8), head(target_embeddings), NOISE, (0.1, 5.0), **options), target_embeddings


def test_the_network_is_shown_scaled_z_or_the_head_is():
    block, _ = make()
    x, z, sigma = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 8), torch.tensor([0.5, 2.0])
    block(x, z, sigma)
    seen, c_noise = block.network.seen
    torch.testing.assert_close(seen[0], z[0] / (0.5**2 + 0.5**2) ** 0.5)
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    trunk, _ = make(DenoisingHead)
    answer = trunk(x, z, sigma)
    assert trunk.network.seen == ()
    assert torch.equal(answer, trunk.head(trunk.network.features.expand(2, 3, 8), z, sigma))


@pytest.mark.parametrize("head", [PosteriorHead, DenoisingHead])
def test_one_noise_level_may_stand_for_all_samples(head):
    block, _ = make(head)
    x, z = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 8)
    for one in (0.5, torch.tensor(0.5)):
        assert torch.equal(block(x, z, one), block(x, z, torch.tensor([0.5, 0.5])))


@pytest.mark.parametrize("head", [PosteriorHead, DenoisingHead])
@pytest.mark.parametrize("weighted", ["none", "edm"])
def test_the_loss_weighs_each_sample_by_its_own_sigma(weighted, head):
    """Against a slow loop. mean(w) * mean(loss), what a (B, 1) by (B,) product would give, is far from it."""
    block, target_embeddings = make(head, loss_weight=weighted)
    x = y = torch.randint(6, (64, 3), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    loss = block.loss(x, y)
    torch.manual_seed(7)
    q_low, q_high = NOISE.cdf(0.1), NOISE.cdf(5.0)
    sigmas = NOISE.inverse_cdf(q_low + (q_high - q_low) * torch.rand(64, dtype=torch.float64)).float()
    eps = torch.randn(64, 3, 8)
    total, weights, losses = 0.0, [], []
    for i, sigma in enumerate(sigmas):
        logits = block(x[i : i + 1], (target_embeddings[y[i]] + sigma * eps[i])[None], sigma[None])[0]
        nats = -logits.log_softmax(-1)[torch.arange(3), y[i]].mean()
        weights.append(edm_weight(sigma, 0.5) if weighted == "edm" else torch.tensor(1.0))
        losses.append(nats)
        total += weights[-1] * nats
    torch.testing.assert_close(loss, total / 64)
    if weighted == "edm":
        wrong = torch.stack(weights).mean() * torch.stack(losses).mean()
        assert abs(wrong - loss) > 0.1 * loss


@pytest.mark.parametrize("head", [PosteriorHead, DenoisingHead, PaperHead])
def test_under_bfloat16_autocast_the_loss_is_nearly_the_same(head):
    """At little noise, too, where the likelihood term has thousands of nats."""
    block, _ = make(head)
    block.span = (0.05, 0.2)
    x = y = torch.randint(6, (256, 3), generator=torch.Generator().manual_seed(1))
    losses = []
    for enabled in (False, True):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(block.loss(x, y))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=1e-4)


def test_the_clean_term_asks_for_p_of_y_given_x_where_z_says_nothing():
    """What is added is the cross-entropy of the head's residual at z = 0; and the trunk is evaluated once."""
    plain, _ = make(DenoisingHead)
    block, _ = make(DenoisingHead, clean_weight=0.5)
    for module in (plain, block):  # a head that looks at z, and at the level
        torch.manual_seed(1)
        for weight in module.head.parameters():
            weight.data = torch.randn_like(weight)
    x = y = torch.randint(6, (64, 3), generator=torch.Generator().manual_seed(1))
    calls = []
    block.network.register_forward_hook(lambda *_: calls.append(1))
    losses = []
    for module in (plain, block):
        torch.manual_seed(2)  # the same noise
        losses.append(module.loss(x, y))
    assert len(calls) == 1
    z, highest = torch.zeros(64, 3, 8), torch.full((64,), 5.0)
    log_p = block.head.residual(block.network(x), z, highest).log_softmax(-1)
    torch.testing.assert_close(losses[1] - losses[0], -0.5 * log_p.gather(-1, y[..., None]).mean(), rtol=1e-4, atol=0)


def test_a_network_that_is_shown_z_has_no_clean_term():
    with pytest.raises(AssertionError, match="evaluated twice"):
        make(PosteriorHead, clean_weight=1.0)
    settings = train_gpt.Settings(**train_gpt.PRESETS["tiny"], **train_gpt.RECIPES["nano"] | dict(head="paper"))
    text, partition = train_gpt.prepare(train_gpt.Settings(**vars(settings) | dict(predict="active")))
    assert train_gpt.build(0, settings, text, partition).clean_weight == 0.0
    settings.head = "denoising"
    assert train_gpt.build(0, settings, text, partition).clean_weight == 1.0


class Zero(nn.Module):
    """A network that has learnt nothing: F = 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, z, c_noise):
        return self.scale * z


def test_a_block_of_numbers_trains_on_the_error_of_f_against_its_unit_variance_target():
    """w(sigma) * |D - y|^2 is |F - (y - c_skip z) / c_out|^2: here against a slow loop, with F = 0."""
    noise = LogNormal()
    block, y = DiffusionBlock(Zero(), EDMHead(0.5), noise, (0.3, 80.0), loss_weight="edm"), 0.5 * torch.randn(2000, 3)
    torch.manual_seed(1)
    loss = block.loss(None, y)
    torch.manual_seed(1)
    sigma, total = sample_sigma(noise, 2000, 0.3, 80.0).float(), 0.0
    eps = torch.randn_like(y)
    for i in range(2000):
        c_skip, c_out, _, _ = edm_coefficients(sigma[i], 0.5)
        total += ((y[i] - c_skip * (y[i] + sigma[i] * eps[i])) / c_out).square().mean()
    torch.testing.assert_close(loss, total / 2000)
    assert abs(loss.item() - 1) < 0.1  # unit variance, whatever sigma


def test_the_baseline_is_plain_cross_entropy():
    baseline = EndToEnd(Echo(8), PosteriorHead(make_target_embeddings(6, 8)))
    x, y = torch.zeros(2, 3, dtype=torch.long), torch.randint(6, (2, 3))
    log_p = baseline(x).log_softmax(-1)
    torch.testing.assert_close(baseline.loss(x, y), -log_p.gather(-1, y[..., None]).mean())
    assert baseline.network.seen == ()


@pytest.mark.parametrize(
    "script, noise, flags",
    [
        (train_gpt, train_gpt.NOISE["nano"], ["--seq-len", "8"]),
        (train_gpt, train_gpt.NOISE["paper"], ["--seq-len", "8", "--recipe", "paper"]),
        (train_vit, train_vit.NOISE["nano"], ["--glyphs", "100"]),
        (train_dit, LogNormal(*NOISE_LEVELS["glyphs"][:1]), []),
    ],
    ids=["gpt", "gpt-paper", "vit", "dit"],
)
def test_as_a_script_builds_it_a_block_trains_only_on_its_own_widened_interval(
    cli, text_file, tmp_path, monkeypatch, script, noise, flags
):
    """Recorded where the noise reaches the block."""
    seen, find = [], DiffusionBlock.features
    monkeypatch.setattr(DiffusionBlock, "features", lambda self, *given: seen.append(given[2]) or find(self, *given))
    data = ["--data", text_file] if script is train_gpt else []
    partition, sigmas = make_partition(noise, 3, overlap=0.05), []
    for b in range(3):
        only = ["--only", b, "--out", tmp_path / str(b)]  # of each run, so no evaluation
        tiny = ["--preset", "tiny", "--layers", "3", "--blocks", "3", "--overlap", "0.05", "--steps", "12"]
        code, _, err = cli(*tiny, "--device", "cpu", *data, *flags, *only, main=script.main)
        assert code == 0, err
        sigmas.append(torch.cat(seen))
        seen.clear()
        low, high = map(torch.tensor, partition.training_range(b))
        least, most = sigmas[b].min(), sigmas[b].max()
        assert len(sigmas[b]) >= 12 * 8 and low <= least and most <= high
        assert noise.cdf(most) - noise.cdf(least) > 0.9 * (noise.cdf(high) - noise.cdf(low)), "and fills it"
        assert b == 0 or most > partition.edges[b], "it reaches over its upper edge"
        assert b == 2 or least < partition.edges[b + 1], "and over its lower one"
    assert sigmas[2].max() < sigmas[0].min(), "blocks that are no neighbours share no level"
