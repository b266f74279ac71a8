import pytest
import torch
import torch.nn as nn

from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.codebook import PaperHead, PosteriorHead, log_likelihood, make_codebook
from nano_db.schedule import LogNormal, edm_coefficients, edm_weight

NOISE = LogNormal(0.3, 0.8, 0.05, 20.0)


class Echo(nn.Module):
    """A network that records what it is shown and answers with constant features."""

    def __init__(self, width):
        super().__init__()
        self.features = nn.Parameter(torch.randn(width))

    def forward(self, x, z, c_noise):
        self.seen = x, z, c_noise
        return self.features.expand(*x.shape, -1)


def make(head=PosteriorHead, **options):
    torch.manual_seed(0)
    codebook = make_codebook(6, 8)
    return DiffusionBlock(Echo(8), head(codebook), NOISE, (0.1, 5.0), **options), codebook


def test_codebook_rows_are_unit_and_orthonormal_where_they_fit():
    narrow, wide = make_codebook(6, 8, seed=3), make_codebook(50, 8, seed=3)
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(6))
    torch.testing.assert_close(wide.norm(dim=-1), torch.ones(50))
    assert torch.equal(narrow, make_codebook(6, 8, seed=3)) and not torch.equal(narrow, make_codebook(6, 8, seed=4))


def test_the_posterior_head_is_bayes_rule():
    """With p(y|x) known, the head's answer must be p(y) N(z; E[y], sigma^2) normalised, computed here the long way."""
    codebook = make_codebook(5, 3)  # more classes than dimensions
    prior = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    z, sigma = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), 0.6
    normal = torch.distributions.Normal(codebook, sigma).log_prob(z[:, None]).sum(-1)  # (7, 5)
    expected = (prior.log() + normal).softmax(-1)
    torch.testing.assert_close((prior.log() + log_likelihood(z, sigma, codebook)).softmax(-1), expected)


def test_the_likelihood_stays_float32_under_bfloat16_autocast():
    codebook, z = make_codebook(5, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = log_likelihood(z, 0.05, codebook)
    assert torch.equal(inside, log_likelihood(z, 0.05, codebook))


def test_the_paper_head_is_edm():
    head = PaperHead(make_codebook(5, 8), sigma_data=0.5)
    z, features, sigma = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.tensor([0.2, 4.0])
    c_skip, c_out, _, _ = edm_coefficients(sigma[:, None, None], 0.5)
    torch.testing.assert_close(head(features, z, sigma), head.readout(c_skip * z + c_out * features))


def test_the_network_is_shown_scaled_z_or_nothing():
    block, _ = make()
    x, z = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 8)
    block(x, z, torch.tensor([0.5, 2.0]))
    _, seen, c_noise = block.network.seen
    torch.testing.assert_close(seen[0], z[0] / (0.5**2 + 0.5**2) ** 0.5)
    torch.testing.assert_close(c_noise, torch.tensor([0.5, 2.0]).log() / 4)
    blind, _ = make(shows_z=False)
    blind(x, z, 0.5)
    assert blind.network.seen[1] is None and blind.network.seen[2] is None


@pytest.mark.parametrize("weighted", ["none", "edm"])
def test_the_loss_weighs_each_sample_by_its_own_sigma(weighted):
    """Against a slow loop. mean(w) * mean(loss), what a (B, 1) by (B,) product would give, is far from it."""
    block, codebook = make(loss_weight=weighted)
    x = y = torch.randint(6, (64, 3), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    loss = block.loss((x, y))
    torch.manual_seed(7)
    q_low, q_high = NOISE.cdf(0.1), NOISE.cdf(5.0)
    sigmas = NOISE.inverse_cdf(q_low + (q_high - q_low) * torch.rand(64, dtype=torch.float64)).float()
    eps = torch.randn(64, 3, 8)
    total, weights, losses = 0.0, [], []
    for i, sigma in enumerate(sigmas):
        logits = block(x[i : i + 1], (codebook[y[i]] + sigma * eps[i])[None], sigma[None])[0]
        nats = -logits.log_softmax(-1)[torch.arange(3), y[i]].mean()
        weights.append(edm_weight(sigma, 0.5) if weighted == "edm" else torch.tensor(1.0))
        losses.append(nats)
        total += weights[-1] * nats
    torch.testing.assert_close(loss, total / 64)
    if weighted == "edm":
        wrong = torch.stack(weights).mean() * torch.stack(losses).mean()
        assert abs(wrong - loss) > 0.1 * loss


def test_the_baseline_is_plain_cross_entropy():
    codebook = make_codebook(6, 8)
    baseline = EndToEnd(Echo(8), PosteriorHead(codebook))
    x, y = torch.zeros(2, 3, dtype=torch.long), torch.randint(6, (2, 3))
    log_p = baseline.log_prior(x)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(baseline.loss((x, y)), -log_p.gather(-1, y[..., None]).mean())
