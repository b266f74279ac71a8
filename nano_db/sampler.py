"""The walk from noise to data: the probability-flow ODE, solved step by step.

In the variance-exploding process the ODE is dz/dsigma = (z - D(z; sigma)) / sigma, with D the denoiser (Tweedie's
formula gives the score in terms of D). Its Euler step is a convex blend,

    z_next = z + (sigma_next - sigma) * (z - D) / sigma = a * z + (1 - a) * D,    a = sigma_next / sigma,

which has the shape of a residual update. The paper prints eq. (3)-(5) with the opposite sign, which would make the
noise grow; EDM and the released code have the sign used here.

Each walk is a generator that yields its states, so that a picture or a test needs no sampler of its own.
"""

from itertools import pairwise
from typing import NamedTuple

import torch

from nano_db.heads import mean_embedding


class State(NamedTuple):
    """Where the walk stands after a step: z (B, ..., d) at noise level sigma, and the denoised point that led there."""

    sigma: float
    z: torch.Tensor
    denoised: torch.Tensor


def euler_walk(denoise, z, sigmas):
    """Yield one State per step along the descending levels `sigmas`. denoise(z, sigma) -> D; z starts at sigmas[0].

    If the grid ends at 0, the walk ends at the last D itself.
    """
    for sigma, sigma_next in pairwise(map(float, sigmas)):
        denoised = denoise(z, sigma)
        a = sigma_next / sigma
        z = a * z + (1 - a) * denoised
        yield State(sigma_next, z, denoised)


def heun_walk(denoise, z, sigmas):
    """Like euler_walk, but of second order (EDM, algorithm 1): two evaluations per step, and one for a step to 0."""
    for sigma, sigma_next in pairwise(map(float, sigmas)):
        denoised = denoise(z, sigma)
        slope = (z - denoised) / sigma
        z_next = z + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (z_next - denoise(z_next, sigma_next)) / sigma_next
            z_next = z + (sigma_next - sigma) * (slope + slope_next) / 2
        z = z_next
        yield State(sigma_next, z, denoised)


def draw(log_p, generator=None):
    """One class per position from ln p (B, ..., V), in float64 on the CPU: float32 draws are slightly overconfident."""
    p = log_p.detach().cpu().double().exp()
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1]).to(log_p.device)


def sample_classes(posterior, target_embeddings, shape, sigmas, generator=None):
    """Walk from pure noise with a `posterior` (see stack.py) and draw a class at each position of `shape`, as int64.

    The walk is that of euler_walk with D = p @ E. The last step's D would be a blend of target embeddings wherever
    the last noise level leaves doubt; instead of rounding it, the class is drawn from that step's p(y | z, x).
    """

    def denoise(z, sigma):
        return mean_embedding(posterior(z, sigma), target_embeddings)

    noise = torch.randn(*shape, target_embeddings.shape[1], generator=generator).to(target_embeddings.device)
    z = float(sigmas[0]) * noise
    for state in euler_walk(denoise, z, sigmas[:-1]):
        z = state.z
    return draw(posterior(z, float(sigmas[-2])), generator)
