import pytest
import torch

from data.images import load_images, to_floats
from nano_db.trainer.frechet import FrechetSmall, frechet_distance


def whitened(n, d, generator):
    """n points whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_the_distance_of_two_gaussians_in_closed_form():
    """For commuting covariances: |difference of means|^2 plus the sum of (std_a - std_b)^2 over the common axes."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    std_a, std_b = torch.tensor([1.0, 2, 3, 0.5, 1]).double(), torch.tensor([2.0, 2, 1, 0.1, 0]).double()
    shift = torch.arange(5).double()
    a = whitened(50, 5, generator) * std_a @ turn.T
    b = whitened(70, 5, generator) * std_b @ turn.T + shift
    expected = shift.square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-6)


def test_the_distance_where_covariances_do_not_commute():
    """Against tr (A B)^1/2 by the eigenvalues of the product itself."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 40, 3, dtype=torch.float64, generator=generator)
    b = b @ torch.randn(3, 3, dtype=torch.float64, generator=generator)
    A, B = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_worse_images_are_further_away_and_the_measure_is_seeded():
    images = load_images("glyphs", count=720)
    frechet, again = (FrechetSmall(images, 200, steps=60) for _ in range(2))
    assert frechet.floor == again.floor
    real = to_floats(images.train[:200])
    noisy = (real + 0.7 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    assert frechet(real) < frechet(noisy) < frechet(torch.zeros_like(real) - noisy)
    assert frechet.floor < frechet(noisy)
