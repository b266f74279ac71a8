import torch

from experiments.mixture import GaussianMixture

MIXTURE = GaussianMixture([(2.0, 0.0), (-1.0, 1.5), (-1.0, -1.5)], std=0.3)


def test_the_density_integrates_to_one():
    line = torch.linspace(-8, 8, 400, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    for sigma in (0.0, 0.7):
        total = MIXTURE.log_density(z, sigma).exp().sum() * (line[1] - line[0]) ** 2
        torch.testing.assert_close(float(total), 1.0, rtol=0, atol=1e-9)


def test_density_and_denoiser_obey_tweedies_formula():
    """grad ln p(z; sigma) = (D - z) / sigma^2. The two sides share no line of code."""
    z = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for sigma in (0.1, 1.0, 10.0):
        (score,) = torch.autograd.grad(MIXTURE.log_density(z, sigma).sum(), z)
        torch.testing.assert_close(score, (MIXTURE.denoise(z, sigma) - z) / sigma**2)
