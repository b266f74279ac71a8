import pytest
import torch

from nano_db.codebook import log_likelihood, make_codebook
from nano_db.likelihood import nats_per_block
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal


def bound(prior_logits, y, codebook, noise, blocks=3):
    posterior = lambda z, sigma: (prior_logits + log_likelihood(z, sigma, codebook)).log_softmax(-1)  # noqa: E731
    return nats_per_block(
        posterior, y, codebook, make_partition(noise, blocks), generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("noise", [LogNormal(), LogNormal(0.3, 0.8, 0.05, 20.0)])
@pytest.mark.parametrize("classes, width", [(20, 24), (200, 24)])  # orthonormal rows, and more classes than dimensions
def test_with_constant_logits_the_bound_is_the_cross_entropy(noise, classes, width):
    """Whatever the data: y need not follow softmax(logits)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(classes, generator=generator)
    y = torch.randint(classes, (20_000,), generator=generator)
    nats = bound(logits, y, make_codebook(classes, width), noise)
    cross_entropy = -float(logits.log_softmax(-1)[y].double().mean())
    assert float(nats.sum()) == pytest.approx(cross_entropy, rel=0.01)


def test_the_split_does_not_change_the_sum_and_each_share_is_its_own_interval():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(10, generator=generator), torch.randint(10, (20_000,), generator=generator)
    codebook, noise = make_codebook(10, 10), LogNormal(0.3, 0.8, 0.05, 20.0)
    whole, halves, quarters = (bound(logits, y, codebook, noise, blocks) for blocks in (1, 2, 4))
    torch.testing.assert_close(halves.sum(), whole.sum(), rtol=0.01, atol=0)
    torch.testing.assert_close(quarters.view(2, 2).sum(1), halves, rtol=0.02, atol=0.01)


def test_a_wrong_posterior_pays_and_the_true_one_reaches_the_entropy():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    y = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    codebook, noise = make_codebook(4, 4), LogNormal()
    empirical = torch.bincount(y) / len(y)
    true, wrong = (float(bound(q.log(), y, codebook, noise).sum()) for q in (empirical, p.flip(0)))
    entropy = -float((empirical * empirical.log()).sum())
    assert true == pytest.approx(entropy, rel=0.01)
    assert wrong > entropy + 0.3
