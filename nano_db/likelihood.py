"""An honest likelihood for a denoiser of discrete targets, in the baseline's own units: nats a symbol.

With z = E[y] + sigma * eps and any denoiser D,

    -ln p(y | x) <= integral over ln sigma of E |E[y] - D(z; sigma, x)|^2 / sigma^2

(the I-MMSE relation: Guo, Shamai, Verdu 2005; Kong, Brekelmans, Ver Steeg 2023; with snr = 1 / sigma^2 it is half the
integral of the squared error over snr). It is an equality where D is the exact posterior mean of one fixed p(y | x),
whatever that p is: then the integral is the cross-entropy of p. It splits over sigma, hence over blocks, into the
nats each block answers for.

The paper reports no likelihood for its language models; this is the number that makes them comparable.
"""

import math
from itertools import pairwise

import numpy as np
import torch


def nats_per_block(posterior, y, codebook, partition, density=3, generator=None):
    """The bound, split by block: nats a symbol, (blocks,) float64. Its sum bounds the mean of -ln p(y | x).

    posterior(z, sigma) -> ln p(y | z, x), see stack.py. y (B, ...) classes. In each block's interval, Gauss-Legendre
    quadrature with about `density` points a unit of ln sigma, fresh noise at each. The two ends of the range are
    closed, so that nothing is left out: above sigma_max the error is taken as constant (block 0 pays), at sigma_min
    the symbol is decoded (the last block pays -ln p(y | z)).
    """
    nats = torch.zeros(partition.blocks, dtype=torch.float64)
    for b in range(partition.blocks):
        low, high = map(math.log, partition.interval(b))
        points, weights = np.polynomial.legendre.leggauss(4 + math.ceil(density * (high - low)))  # on [-1, 1]
        for point, weight in zip(points, weights, strict=True):
            sigma = math.exp((low + high) / 2 + (high - low) / 2 * point)
            error = _squared_error(posterior, y, codebook, sigma, generator)
            nats[b] += (high - low) / 2 * weight * error / sigma**2

    top, bottom = partition.edges[0], partition.edges[-1]
    nats[0] += _squared_error(posterior, y, codebook, top, generator) / (2 * top**2)
    nats[-1] += _decoding(posterior, y, codebook, bottom, generator)
    return nats


def nats_of_walk(posterior, y, codebook, sigmas, generator=None):
    """The bound for a walk of finitely many calls, as sampler.sample_classes makes it: nats a symbol, a float.

    The integral becomes a sum: each call's error stands for all levels down to the next call, and the last call
    decodes (Kingma et al. 2021, discrete time: the likelihood of the walk that adds fresh noise at each step). The
    error falls with sigma, so the fewer calls, the more the sum overrates the integral; but a single call decodes at
    once, at sigma_max.
    """
    calls = [float(sigma) for sigma in sigmas[:-1]]
    nats = 1 / (2 * float(sigmas[0]) ** 2)  # the walk starts from N(0, sigma_max^2), not around E[y]; |E[y]| = 1
    for sigma, sigma_next in pairwise(calls):
        error = _squared_error(posterior, y, codebook, sigma, generator)
        nats += (1 / sigma_next**2 - 1 / sigma**2) / 2 * error
    return nats + _decoding(posterior, y, codebook, calls[-1], generator)


def _answer(posterior, y, codebook, sigma, generator):
    """ln p(y | z, x) for a fresh z = E[y] + sigma * eps."""
    clean = codebook[y]
    return posterior(clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device), sigma)


def _squared_error(posterior, y, codebook, sigma, generator):
    denoised = _answer(posterior, y, codebook, sigma, generator).exp() @ codebook
    return float((codebook[y] - denoised).square().sum(-1).double().mean())


def _decoding(posterior, y, codebook, sigma, generator):
    """Mean of -ln p(y | z, x), in nats."""
    return -float(_answer(posterior, y, codebook, sigma, generator).gather(-1, y[..., None]).double().mean())
