import math

import numpy as np
import pytest
import torch

from nano_db.schedule import (
    LogNormal,
    edm_coefficients,
    edm_weight,
    equal_probability_grid,
    karras_grid,
    quantiles,
    sample_sigma,
)

NOISES = [LogNormal(), LogNormal(-0.7, 0.6, 0.05, 20.0)]


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
    share = density[u <= 0].sum() / density.sum()  # below sigma = 1, by a sum
    assert float(noise.cdf(1.0)) == pytest.approx(share, abs=1e-4)


def test_upper_quantiles_of_a_narrow_distribution_stay_finite():
    edges = quantiles(LogNormal(-0.7, 0.6, 0.05, 20.0), 1000)
    assert torch.isfinite(edges).all() and (edges.diff() < 0).all()


@pytest.mark.parametrize("blocks", [2, 3, 4, 6])
def test_a_grid_of_a_multiple_of_B_steps_meets_the_edges_to_the_last_bit(blocks):
    for noise in NOISES:
        grid, edges = equal_probability_grid(noise, 4 * blocks), quantiles(noise, blocks)
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
