import math

import pytest
import torch

from experiments.mixture import GaussianMixture
from nano_db.heads import log_likelihood, make_target_embeddings
from nano_db.sampler import draw, euler_walk, heun_walk, sample_classes
from nano_db.schedule import LogNormal, equal_probability_grid, karras_grid

NOISE = LogNormal(0.3, 0.8, 0.05, 20.0)


def test_one_euler_step_with_the_true_denoiser_lands_on_the_same_noise_at_the_next_level():
    """The sign of the paper's eq. (3)-(5): with the opposite one the noise would grow."""
    generator = torch.Generator().manual_seed(0)
    y, eps = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    (state,) = euler_walk(lambda z, sigma: y, y + 4.0 * eps, [4.0, 1.5])
    torch.testing.assert_close(state.z, y + 1.5 * eps, rtol=0, atol=1e-14)
    assert state.sigma == 1.5


def test_a_grid_that_ends_at_zero_ends_at_the_denoised_point():
    *_, last = euler_walk(lambda z, sigma: 0.5 * z, torch.ones(2), [2.0, 1.0, 0.0])
    assert torch.equal(last.z, last.denoised)


@pytest.mark.parametrize("walk", [euler_walk, heun_walk])
def test_walks_bring_noise_back_to_a_gaussian_mixture(walk):
    mixture = GaussianMixture([(2.0, 0.0), (-1.0, 1.5), (-1.0, -1.5)], std=0.2)
    generator = torch.Generator().manual_seed(0)
    z = 80.0 * torch.randn(6000, 2, dtype=torch.float64, generator=generator)
    *_, last = walk(mixture.denoise, z, karras_grid(LogNormal(), 200))
    offsets = last.z[:, None] - mixture.means
    nearest = offsets.square().sum(-1).argmin(-1)
    shares = torch.bincount(nearest, minlength=3) / len(z)
    assert float((shares - 1 / 3).abs().max()) < 0.03
    within = torch.stack([offset[k] for offset, k in zip(offsets, nearest, strict=True)])
    assert float(within.mean(0).abs().max()) < 0.02
    torch.testing.assert_close(within.std(0), torch.full((2,), 0.2, dtype=torch.float64), rtol=0.08, atol=0)


def test_heun_is_of_higher_order():
    """Data N(0, 1): D = z / (1 + sigma^2), and the ODE's solution is z * sqrt((1 + s1^2) / (1 + s0^2))."""
    exact = math.sqrt((1 + 0.1**2) / (1 + 10**2))

    def error(walk, steps):
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        *_, last = walk(lambda z, sigma: z / (1 + sigma**2), torch.ones(1, dtype=torch.float64), sigmas)
        return abs(float(last.z) - exact)

    assert 1.8 < error(euler_walk, 100) / error(euler_walk, 200) < 2.2
    assert 3.6 < error(heun_walk, 100) / error(heun_walk, 200) < 4.4


def oracle(prior, target_embeddings):
    return lambda z, sigma: (prior.log() + log_likelihood(z, sigma, target_embeddings)).log_softmax(-1)


@pytest.mark.parametrize("steps", [1, 16, 64])
def test_classes_sampled_with_an_oracle_follow_it(steps):
    """Chi-square against p(y|x), 7 degrees of freedom: 24.3 is exceeded by one seed in a thousand."""
    prior = torch.tensor([0.3, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02])
    target_embeddings, count = make_target_embeddings(8, 12), 4000
    y = sample_classes(
        oracle(prior, target_embeddings),
        target_embeddings,
        (count,),
        equal_probability_grid(NOISE, steps),
        torch.Generator().manual_seed(1),
    )
    expected = prior * count
    chi_square = float(((torch.bincount(y, minlength=8) - expected) ** 2 / expected).sum())
    assert chi_square < 24.3


def test_under_bfloat16_autocast_a_walk_with_an_oracle_ends_at_the_same_classes():
    target_embeddings, sigmas, z_seen = make_target_embeddings(65, 64), equal_probability_grid(NOISE, 16), []

    def posterior(z, sigma):
        z_seen.append(z)
        return oracle(torch.full((65,), 1 / 65), target_embeddings)(z, sigma)

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sample_classes(posterior, target_embeddings, (50,), sigmas, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, z_seen[:16], z_seen[16:])) and len(z_seen) == 32


def test_draws_are_made_in_float64(monkeypatch):
    """In float32 the least probable classes come too seldom, by too little for a test that counts them."""
    dtypes, multinomial = [], torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *more, **named: dtypes.append(p.dtype) or multinomial(p, *more, **named)
    )
    draw(torch.zeros(2, 3).log_softmax(-1))
    assert dtypes == [torch.float64]


def test_draws_follow_the_probabilities_given():
    log_p = torch.tensor([0.7, 0.2, 0.1]).log().expand(20_000, 1, 3)
    shares = torch.bincount(draw(log_p, torch.Generator().manual_seed(0)).flatten()) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.015, rtol=0)
