"""An honest likelihood for a denoiser of discrete targets, in the baseline's own units: nats per symbol.

With z = E[y] + sigma * eps and any denoiser D,

    -ln p(y | x) <= integral over ln sigma of E |E[y] - D(z; sigma, x)|^2 / sigma^2

(the I-MMSE relation: Guo, Shamai, Verdu 2005; Kong, Brekelmans, Ver Steeg 2023; with snr = 1 / sigma^2 it is half the
integral of the squared error over snr). It is an equality where D is the exact posterior mean of one fixed p(y | x),
whatever that p is: then the integral is the cross-entropy of p. It splits over sigma, hence over blocks, into the nats
each block answers for.

The walk that is meant adds fresh noise at each of infinitely many steps. (`sample_classes` of sampler.py adds none, and
takes few.) It may stop before sigma = 0: at any level s it may decode, that is draw y from p(y | z, x), and
-ln p(y | z_s, x) takes the place of the integral below s. Each s gives a bound. We take the one at sigma_min, unless
another is clearly tighter: if z leaves no doubt but a network is only 90% certain, 1 / sigma^2 turns that into
thousands of nats.
The paper reports no likelihood for its language models; this bound makes them comparable.
"""

import math
from itertools import pairwise

import torch

from nano_db.heads import mean_embedding

MARGIN = 0.05  # "clearly": more than the noise of an estimate from a few thousand tokens, else the minimum is biased


def nats_per_block(posterior, y, target_embeddings, partition, generator=None):
    """The bound, split by block: nats per symbol, (blocks,) float64. Its sum bounds the mean of -ln p(y | x).
    posterior(z, sigma) -> ln p(y | z, x), see stack.py. y (B, ...) classes.
    """
    levels = quadrature(partition)
    return split_by_block(levels, measure(posterior, y, target_embeddings, [sigma for _, sigma in levels], generator))


def quadrature(partition, density=6):
    """Levels to measure, [(block, sigma), ...] descending: `density` per unit of ln sigma, and each interval's ends."""
    levels = []
    for b in range(partition.blocks):
        low, high = partition.interval(b)
        low *= 1 + 1e-9  # the edge itself belongs to the next block: stay just above it
        steps = 1 + math.ceil(density * math.log(high / low))
        inner = [high * (low / high) ** (i / steps) for i in range(1, steps)]
        levels += [(b, sigma) for sigma in (high, *inner, low)]
    return levels


def measure(posterior, y, target_embeddings, sigmas, generator=None):
    """At each level, with fresh noise: E |E[y] - D|^2 and the nats of decoding, -ln p(y | z, x). (levels, 2) float64"""
    clean, rows = target_embeddings[y], []  # (B, ..., d)
    for sigma in sigmas:
        z = clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device)
        log_p = posterior(z, sigma)  # (B, ..., V)
        error = (clean - mean_embedding(log_p, target_embeddings)).square().sum(-1)
        decoding = -log_p.gather(-1, y[..., None])
        rows.append([float(error.cpu().double().mean()), float(decoding.cpu().double().mean())])
    return torch.tensor(rows, dtype=torch.float64)


def split_by_block(levels, measured):
    """The bound from what `measure` found at the levels of `quadrature`, by the trapezoidal rule. (blocks,)

    Above sigma_max no network is used: the walk starts from N(0, sigma_max^2) and not around E[y], and block 0 pays the
    divergence of the two, |E[y]|^2 / (2 sigma_max^2) with |E[y]| = 1. The block where the walk decodes pays for that;
    later blocks are not used, so they contribute zero.
    """
    shares, bounds = torch.zeros(levels[-1][0] + 1, dtype=torch.float64), []  # one bound per level at which to decode
    shares[0] = 1 / (2 * levels[0][1] ** 2)
    for k, ((b, sigma), (error, decoding)) in enumerate(zip(levels, measured, strict=True)):
        if k and levels[k - 1][0] == b:
            sigma_before, error_before = levels[k - 1][1], measured[k - 1, 0]
            shares[b] += math.log(sigma_before / sigma) * (error_before / sigma_before**2 + error / sigma**2) / 2
        bounds.append(shares.clone())
        bounds[-1][b] += decoding
    tightest = min(bounds, key=torch.sum)
    return tightest if tightest.sum() < (1 - MARGIN) * bounds[-1].sum() else bounds[-1]


def nats_of_walk(posterior, y, target_embeddings, sigmas, generator=None):
    """The bound for finitely many sampling steps at the levels `sigmas` (a grid that ends at 0): nats per symbol.

    It bounds -ln p of a walk that adds fresh noise after each step and decodes at its last (Kingma et al. 2021,
    discrete time). The integral becomes a sum in which each step's error stands for all levels down to the next step.
    That is too large, the more so the wider the steps in 1 / sigma^2. A single step decodes at sigma_max, and has no
    sum. So even with an exact posterior one step gives the lowest bound, and only many steps come close to it again.
    """
    levels = [float(sigma) for sigma in sigmas[:-1]]
    measured = measure(posterior, y, target_embeddings, levels, generator)
    nats = 1 / (2 * levels[0] ** 2)  # as in split_by_block
    for (sigma, sigma_next), error in zip(pairwise(levels), measured[:-1, 0].tolist(), strict=True):
        nats += (1 / sigma_next**2 - 1 / sigma**2) / 2 * error
    return nats + float(measured[-1, 1])
