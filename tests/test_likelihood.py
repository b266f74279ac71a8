import math

import pytest
import torch

from nano_db.heads import log_likelihood, make_target_embeddings
from nano_db.likelihood import nats_of_walk, nats_per_block, quadrature
from nano_db.partition import make_partition
from nano_db.schedule import LogNormal, equal_probability_grid


def bound(prior_logits, y, target_embeddings, noise, blocks=3):
    posterior = lambda z, sigma: (prior_logits + log_likelihood(z, sigma, target_embeddings)).log_softmax(-1)  # noqa: E731
    return nats_per_block(
        posterior, y, target_embeddings, make_partition(noise, blocks), generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("noise", [LogNormal(), LogNormal(0.3, 0.8, 0.05, 20.0)])
@pytest.mark.parametrize(
    "classes, width",  # orthonormal rows, and more classes than dimensions
    [(20, 24), pytest.param(200, 24, marks=pytest.mark.slow)],
)
def test_with_constant_logits_the_bound_is_the_cross_entropy(noise, classes, width):
    """Whatever the data: y need not follow softmax(logits)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(classes, generator=generator)
    y = torch.randint(classes, (20_000,), generator=generator)
    nats = bound(logits, y, make_target_embeddings(classes, width), noise)
    cross_entropy = -float(logits.log_softmax(-1)[y].double().mean())
    assert float(nats.sum()) == pytest.approx(cross_entropy, rel=0.01)


@pytest.mark.parametrize("noise", [LogNormal(), LogNormal(0.3, 0.8, 0.05, 20.0)])
def test_the_bound_of_an_exact_posterior_is_the_same_under_bfloat16_autocast(noise):
    """At sigma = 0.002 the rounding of a bfloat16 product, divided by sigma^2, would be 0.4 nats."""
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(65, generator=generator), torch.randint(65, (2000,), generator=generator)
    target_embeddings = make_target_embeddings(65, 128)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = bound(logits, y, target_embeddings, noise, blocks=4)
    assert torch.equal(rounded, bound(logits, y, target_embeddings, noise, blocks=4))


def test_the_split_does_not_change_the_sum_and_each_share_is_its_own_interval():
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(10, generator=generator), torch.randint(10, (20_000,), generator=generator)
    target_embeddings, noise = make_target_embeddings(10, 10), LogNormal(0.3, 0.8, 0.05, 20.0)
    whole, halves, quarters = (bound(logits, y, target_embeddings, noise, blocks) for blocks in (1, 2, 4))
    torch.testing.assert_close(halves.sum(), whole.sum(), rtol=0.01, atol=0)
    torch.testing.assert_close(quarters.view(2, 2).sum(1), halves, rtol=0.02, atol=0.01)


def test_a_wrong_posterior_pays_and_the_true_one_reaches_the_entropy():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    y = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    target_embeddings, noise = make_target_embeddings(4, 4), LogNormal()
    empirical = torch.bincount(y) / len(y)
    true, wrong = (float(bound(q.log(), y, target_embeddings, noise).sum()) for q in (empirical, p.flip(0)))
    entropy = -float((empirical * empirical.log()).sum())
    assert true == pytest.approx(entropy, rel=0.01)
    assert wrong > entropy + 0.3


def test_the_bound_decodes_where_it_is_tightest():
    """An answer that is never surer than 99.1% would cost 11 nats more at sigma = 0.002, yet hardly any if decoded at
    a level where z gives the class away.
    """
    target_embeddings, noise = make_target_embeddings(10, 10), LogNormal()
    y = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(0))

    def posterior(z, sigma):
        p = log_likelihood(z, sigma, target_embeddings).softmax(-1)
        return (0.99 * p + 0.01 / 10).log()

    nats = nats_per_block(
        posterior, y, target_embeddings, make_partition(noise, 3), generator=torch.Generator().manual_seed(0)
    )
    assert 0.98 * math.log(10) < float(nats.sum()) < 1.05 * math.log(10)
    assert nats[2] == 0  # block 2 (sigma < 0.18) is never reached


@pytest.mark.parametrize("steps", [1, 8, 2000])
def test_the_bound_of_a_walk_has_its_minimum_at_one_step_and_falls_to_the_integral(steps):
    """With an exact posterior, one step decodes p(y) itself; more steps are a Riemann sum of a falling error."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    y = torch.multinomial(p, 5000, replacement=True, generator=torch.Generator().manual_seed(0))
    target_embeddings, noise = make_target_embeddings(4, 4), LogNormal(0.3, 0.8, 0.05, 20.0)
    posterior = lambda z, sigma: (p.log() + log_likelihood(z, sigma, target_embeddings)).log_softmax(-1)  # noqa: E731
    sigmas = equal_probability_grid(noise, steps)
    nats = nats_of_walk(posterior, y, target_embeddings, sigmas, torch.Generator().manual_seed(0))
    entropy = -float(p.log()[y].mean())
    if steps == 8:
        assert nats > 1.05 * entropy
    else:
        assert nats == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize("sigma_max", [20.0, 40.0, 50.0, 80.0])
def test_each_level_of_the_quadrature_is_answered_by_the_block_that_pays(sigma_max):
    for blocks in range(1, 13):
        for noise in (LogNormal(sigma_max=sigma_max), LogNormal(0.3, 0.8, 0.05, sigma_max)):
            partition = make_partition(noise, blocks)
            assert all(partition.route(sigma) == b for b, sigma in quadrature(partition))


def test_a_narrow_range_of_noise_is_still_a_bound():
    """At sigma_max = 0.2 the walk would have to start from what no noise of 0.2 looks like: that has its price."""
    p = torch.full((10,), 0.1)
    y = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(0))
    assert float(bound(p.log(), y, make_target_embeddings(10, 10), LogNormal(sigma_max=0.2)).sum()) > math.log(10)
