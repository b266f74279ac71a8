import math

import numpy as np
import pytest
import torch

from nano_db.heads import make_codebook
from nano_db.schedule import (
    Information,
    LogNormal,
    edm_coefficients,
    edm_weight,
    equal_mass_grid,
    karras_grid,
    quantiles,
    sample_sigma,
)


def information():
    frequencies = torch.arange(1.0, 11.0, dtype=torch.float64) / 55
    return Information(frequencies, make_codebook(10, 16))


NOISES = [LogNormal(), LogNormal(-0.7, 0.6, 0.05, 20.0), information()]


@pytest.mark.parametrize("noise", NOISES)
def test_cdf_and_inverse_undo_each_other_and_meet_the_ends(noise):
    q = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(noise.cdf(noise.inverse_cdf(q)), q, atol=1e-9, rtol=0)
    ends = noise.inverse_cdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([noise.sigma_min, noise.sigma_max], dtype=torch.float64))


@pytest.mark.parametrize("noise", NOISES)
def test_samples_follow_the_cdf_inside_the_interval_asked_for(noise):
    low, high = float(noise.inverse_cdf(0.3)), float(noise.inverse_cdf(0.8))
    sigma = sample_sigma(noise, 40_000, low, high, torch.Generator().manual_seed(0))
    assert low <= sigma.min() and sigma.max() <= high
    for share in (0.25, 0.5, 0.75):
        inside = noise.inverse_cdf(0.3 + 0.5 * share)
        assert float((sigma <= inside).double().mean()) == pytest.approx(share, abs=0.01)


def test_lognormal_density_is_the_formula():
    noise = LogNormal(0.2, 0.7, 0.1, 5.0)
    u = np.linspace(math.log(0.1), math.log(5.0), 20_001)
    density = np.exp(-0.5 * ((u - 0.2) / 0.7) ** 2)
    share = density[u <= 0].sum() / density.sum()  # mass below sigma = 1, by a sum
    assert float(noise.cdf(1.0)) == pytest.approx(share, abs=1e-4)


def test_upper_quantiles_of_a_narrow_distribution_stay_finite():
    edges = quantiles(LogNormal(-0.7, 0.6, 0.05, 20.0), 1000)
    assert torch.isfinite(edges).all() and (edges.diff() < 0).all()


def test_information_noise_spreads_the_nats_evenly():
    """Half of the entropy of the class frequencies must lie above the median of the distribution."""
    frequencies = torch.arange(1.0, 11.0, dtype=torch.float64) / 55
    codebook = make_codebook(10, 16)
    noise = information()
    generator = torch.Generator().manual_seed(1)
    y = torch.multinomial(frequencies, 20_000, replacement=True, generator=generator)
    u = np.linspace(math.log(0.05), math.log(20), 60)
    density = []
    for sigma in np.exp(u):
        z = codebook[y] + float(sigma) * torch.randn(len(y), 16, generator=generator)
        p = (frequencies.log() + z @ codebook.T / sigma**2).softmax(-1).float()
        density.append(float((codebook[y] - p @ codebook).square().sum(-1).mean()) / sigma**2)
    density = np.array(density)
    entropy = -float((frequencies * frequencies.log()).sum())
    assert density.sum() * (u[1] - u[0]) == pytest.approx(entropy, rel=0.02)
    above = density[u > math.log(float(noise.inverse_cdf(0.5)))].sum() / density.sum()
    assert above == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("blocks", [2, 3, 4, 6])
def test_a_grid_of_a_multiple_of_B_calls_meets_the_edges_to_the_last_bit(blocks):
    for noise in NOISES:
        grid, edges = equal_mass_grid(noise, 4 * blocks), quantiles(noise, blocks)
        assert grid[0] == noise.sigma_max and grid[-1] == 0 and (grid.diff() < 0).all()
        assert torch.equal(grid[:-1:4], edges[:-1])


def test_karras_grid():
    grid = karras_grid(LogNormal(), 5)
    assert grid[0] == pytest.approx(80) and grid[-2] == pytest.approx(0.002) and grid[-1] == 0
    root = grid[:-1] ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(4))


def test_edm_coefficients_give_unit_variance_in_and_out():
    """c_in z has unit variance, and so has the target of F, (y - c_skip z) / c_out: EDM's requirements, by Monte
    Carlo.
    """
    generator = torch.Generator().manual_seed(0)
    y = 0.5 * torch.randn(200_000, dtype=torch.float64, generator=generator)
    for sigma in (0.05, 0.5, 7.0):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        z = y + sigma * torch.randn(len(y), dtype=torch.float64, generator=generator)
        c_skip, c_out, c_in, c_noise = edm_coefficients(sigma, 0.5)
        assert float((c_in * z).std()) == pytest.approx(1, abs=0.01)
        assert float(((y - c_skip * z) / c_out).std()) == pytest.approx(1, abs=0.01)
        assert float(edm_weight(sigma, 0.5) * c_out**2) == pytest.approx(1)
        assert float(c_noise) == pytest.approx(math.log(float(sigma)) / 4)
