"""The trained image blocks put together, and what they are for: denoising, sampling with guidance, and a loss.

The twin of stack.py for targets that are the data itself. At each noise level one block answers, so that a call costs
L/B layers, and no more than one block need be in memory.
"""

import torch
import torch.nn as nn

from nano_db.sampler import euler_walk, heun_walk
from nano_db.schedule import edm_weight

WALKS = {"euler": euler_walk, "heun": heun_walk}


class MeanDenoiser(nn.Module):
    """Networks trained independently at the same noise levels, as one: the mean of their D at each call.

    A mean of the images that they paint would blur. A mean of D does not: D is an estimate of E[y | z], and the mean of
    several estimates errs less than they do on average.
    """

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, labels, z, sigma):
        """labels (B,), z (B, C, H, W) -> D (B, C, H, W)."""
        return torch.stack([block(labels, z, sigma) for block in self.blocks]).mean(0)


class ImageStack:
    """blocks: DiffusionBlocks of images given labels, noisiest first, with their Partition; the baseline is a single
    one. null_label: the label that says nothing, which training puts in the place of a share of the labels.
    """

    def __init__(self, blocks, partition, null_label):
        self.blocks, self.partition, self.null_label = blocks, partition, null_label

    def denoiser(self, labels, guidance=1.0):
        """A function (z, sigma) -> D for images z (B, C, H, W) of the classes `labels` (B,), for a walk of sampler.py.

        guidance g: classifier-free (Ho & Salimans 2021), D = D_null + g * (D_label - D_null). 1 is none, and costs one
        call; else there are two.
        """
        null = torch.full_like(labels, self.null_label)

        def denoise(z, sigma):
            block = self.blocks[self.partition.route(sigma)]
            denoised = block(labels, z, sigma)
            if guidance == 1:
                return denoised
            without = block(null, z, sigma)
            return without + guidance * (denoised - without)

        return denoise

    @torch.no_grad()
    def walk(self, labels, shape, sigmas, guidance=1.0, solver="euler", generator=None):
        """Yield the States (sampler.py) of a walk from noise to images of `labels`, (B, *shape)."""
        z = float(sigmas[0]) * torch.randn(len(labels), *shape, generator=generator).to(labels.device)
        yield from WALKS[solver](self.denoiser(labels, guidance), z, sigmas)


@torch.no_grad()
def edm_loss(stack, batches, noise, sigma_data, levels=24, seed=0):
    """Held-out E[w(sigma) * |D - y|^2], mean over pixels, sigma from p_noise; without guidance.

    batches: a list of (images, labels). p_noise is represented by the middles of `levels` intervals of equal mass, and
    the noise added is the same at each call, so that two networks see the same noisy images.
    Returns {"edm_loss": the whole, "edm_loss_by_block": each block's part of it, which add up}.
    """
    parts, total = torch.zeros(stack.partition.blocks, dtype=torch.float64), sum(len(y) for y, _ in batches)
    for level in reversed(range(levels)):  # noisiest first, as the blocks stand
        sigma = float(noise.inverse_cdf((level + 0.5) / levels))
        generator, error = torch.Generator().manual_seed(seed * levels + level), 0.0
        for y, labels in batches:
            z = y + sigma * torch.randn(y.shape, generator=generator).to(y.device)
            error += len(y) * float((stack.denoiser(labels)(z, sigma) - y).square().mean())
        weight = float(edm_weight(torch.tensor(sigma, dtype=torch.float64), sigma_data))
        parts[stack.partition.route(sigma)] += weight * error / total / levels
    return {"edm_loss": float(parts.sum()), "edm_loss_by_block": parts.tolist()}
