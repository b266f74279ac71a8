"""A denoiser in closed form, to try samplers without training: the data is a mixture of isotropic Gaussians."""

import math

import torch


class GaussianMixture:
    """Equal-weight mixture of N(mean_k, std^2 I). means (K, d)."""

    def __init__(self, means, std):
        self.means, self.std = torch.as_tensor(means, dtype=torch.float64), std

    def sample(self, count, generator=None):
        """(count, d) draws of the data."""
        component = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[component] + self.std * noise

    def denoise(self, z, sigma):
        """The exact E[y | z] of z = y + sigma * eps (n, d): the components' means, weighted by Bayes' rule."""
        variance = self.std**2 + sigma**2
        offsets = z[:, None] - self.means  # (n, K, d)
        weights = (-offsets.square().sum(-1) / (2 * variance)).softmax(-1)  # (n, K)
        posterior_means = self.means + self.std**2 / variance * offsets  # (n, K, d)
        return (weights[..., None] * posterior_means).sum(1)

    def log_density(self, z, sigma):
        """ln p(z; sigma), the density of y + sigma * eps, in nats: noise only widens the components. (n,)"""
        variance, dimensions = self.std**2 + sigma**2, self.means.shape[1]
        exponents = -(z[:, None] - self.means).square().sum(-1) / (2 * variance)  # (n, K)
        log_normalizer = dimensions / 2 * math.log(2 * math.pi * variance) + math.log(len(self.means))
        return exponents.logsumexp(-1) - log_normalizer
