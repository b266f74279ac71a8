"""Noise levels: how often each sigma is trained, the EDM coefficients, and grids for a sampler.

The process is variance exploding: z = y + sigma * eps. A noise distribution p_noise over sigma is any object with

    sigma_min, sigma_max    the range, floats
    cdf(sigma)              share of the training below sigma: 0 at sigma_min, 1 at sigma_max
    inverse_cdf(q)          the sigma below which a share q of the training lies

Partition, sampling and grids use only these four, so any such distribution will do. (A script's run also writes down
p_mean and p_std: trainer/run.py, noise_identity.) All of it is float64: in float32 the upper probabilities of a narrow
distribution round to 1, and all upper levels become sigma_max.
"""

import torch

from nano_db.errors import UsageError


class LogNormal:
    """ln sigma ~ N(p_mean, p_std^2), truncated to [sigma_min, sigma_max]. The paper's choice, with EDM's constants."""

    def __init__(self, p_mean=-1.2, p_std=1.2, sigma_min=0.002, sigma_max=80.0):
        self.p_mean, self.p_std = p_mean, p_std
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
        # Probability of the untruncated normal below either end:
        self._below, above = torch.special.ndtr((ends - p_mean) / p_std).tolist()
        self.inside = above - self._below
        if not self.inside > 1e-6:
            raise UsageError(f"p_mean {p_mean} leaves next to no probability in [{sigma_min}, {sigma_max}]: change it")

    def cdf(self, sigma):
        log_sigma = torch.as_tensor(sigma, dtype=torch.float64).log()
        return (torch.special.ndtr((log_sigma - self.p_mean) / self.p_std) - self._below) / self.inside

    def inverse_cdf(self, q):
        q = torch.as_tensor(q, dtype=torch.float64)
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(self._below + q * self.inside))
        return sigma.clamp(self.sigma_min, self.sigma_max)


def sample_sigma(noise, count, low, high, generator=None, device="cpu"):
    """`count` noise levels from p_noise between low and high: uniform in cdf space, then the inverse cdf. (count,)"""
    q_low, q_high = noise.cdf(low), noise.cdf(high)
    q = q_low + (q_high - q_low) * torch.rand(count, dtype=torch.float64, generator=generator, device=device)
    return noise.inverse_cdf(q).clamp(low, high)


def quantiles(noise, parts):
    """The parts + 1 levels that cut p_noise at equal probabilities, from sigma_max down to sigma_min. (parts + 1,)
    The quantile 1/2 is the same number for 2 parts and for 8: a sampler's grid meets the edges of blocks exactly.
    """
    sigmas = noise.inverse_cdf(torch.arange(parts, -1, -1, dtype=torch.float64) / parts)
    sigmas[0], sigmas[-1] = noise.sigma_max, noise.sigma_min  # the ends, exact to the last bit
    return sigmas


def equal_probability_grid(noise, steps):
    """Levels of a sampler's steps: `steps` equal-probability quantiles from sigma_max down, then 0. (steps + 1,)"""
    sigmas = quantiles(noise, steps)
    sigmas[-1] = 0.0
    return sigmas


def karras_grid(noise, steps, rho=7.0):
    """EDM's grid (eq. 5): `steps` levels evenly spaced in sigma^(1/rho), then 0. (steps + 1,)"""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = noise.sigma_max ** (1 / rho), noise.sigma_min ** (1 / rho)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])


def edm_coefficients(sigma, sigma_data):
    """c_skip, c_out, c_in, c_noise of D = c_skip * z + c_out * F(c_in * z, c_noise) (EDM, table 1)."""
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


def edm_weight(sigma, sigma_data):
    """w = 1 / c_out^2, which makes the squared error of F weigh the same at every sigma (EDM, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
