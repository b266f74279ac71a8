"""Images: as sequences of patches for a transformer, and as targets that blocks denoise, with guidance and a loss.

An ImageStack is the twin of stack.py for targets that are the data itself. At each noise level one block is active: a
sampling step costs L/B layers, and only one block need be in memory.
"""

import torch
import torch.nn.functional as F

from nano_db.errors import UsageError
from nano_db.sampler import euler_walk
from nano_db.schedule import edm_weight

TOGETHER = 250  # images that pass through a block at a time
VALIDATION, TEST = slice(0, None, 2), slice(1, None, 2)  # of held-out images: to choose settings, and to report


def patchify(images, patch):
    """(B, C, H, W) -> (B, T, C * patch^2), row by row; T = H * W / patch^2."""
    return F.pixel_unshuffle(images, patch).flatten(2).transpose(1, 2).contiguous()


def unpatchify(patches, patch, height):
    """The inverse, for images of `height` pixels: (B, T, C * patch^2) -> (B, C, H, W)."""
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (height // patch, -1)), patch)


def patch_positions(shape, patch, width, base=10_000.0):
    """Fixed embeddings of the patches' rows and columns by sines and cosines, a quarter of `width` each. (T, width)
    Their root mean square is 1. Raises UsageError unless patches fill the image, and `width` is a multiple of 4.
    """
    _, H, W = shape
    if H % patch or W % patch:
        raise UsageError(f"patches of {patch} pixels must divide the image's height and width, {H} x {W} pixels")
    if width % 4:
        raise UsageError(f"width {width} is not a multiple of 4: rows and columns each need sines and cosines")
    frequencies = base ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(H // patch), torch.arange(W // patch), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=1)
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)


class ImageStack:
    """blocks: DiffusionBlocks of images given labels, noisiest first, with their Partition; the baseline is a single
    block. shape: an image's, (C, H, W). null_label: the label for "no class", numbered after the classes.
    """

    def __init__(self, blocks, partition, shape, null_label):
        self.blocks, self.partition = blocks, partition
        self.shape, self.null_label = shape, null_label

    def denoiser(self, labels, guidance=1.0):
        """A function (z, sigma) -> D for images z (B, C, H, W) of the classes `labels` (B,), for a walk of sampler.py.

        guidance g: classifier-free (Ho & Salimans 2021), D = D_null + g * (D_label - D_null). 1: none, half the cost.
        """

        def denoise(z, sigma):
            block = self.blocks[self.partition.route(sigma)]  # once for all images: its file may have to be read
            parts = zip(z.split(TOGETHER), labels.split(TOGETHER), strict=True)
            return torch.cat([self._guided(block, noisy, told, sigma, guidance) for noisy, told in parts])

        return denoise

    def _guided(self, block, z, labels, sigma, guidance):
        denoised = block(labels, z, sigma)
        if guidance == 1:
            return denoised
        without = block(torch.full_like(labels, self.null_label), z, sigma)
        return without + guidance * (denoised - without)

    @torch.no_grad()
    def walk(self, labels, sigmas, guidance=1.0, generator=None):
        """Yield the States (sampler.py) of a walk from noise to images of `labels`, (B, C, H, W)."""
        z = float(sigmas[0]) * torch.randn(len(labels), *self.shape, generator=generator).to(labels.device)
        yield from euler_walk(self.denoiser(labels, guidance), z, sigmas)


@torch.no_grad()
def edm_loss(stack, batches, sigma_data, levels=24, seed=0):
    """E[w(sigma) * |D - y|^2] on held-out images, averaged over pixels, with sigma from p_noise, without guidance.

    batches: a list of (images, labels). p_noise is represented by the midpoints of `levels` intervals of equal
    probability. The noise added is the same in every call, so that two networks see the same noisy images.
    Returns, for the test half, {"edm_loss": the total, "edm_loss_by_block": each block's part of it}; and for the
    validation half {"validation_edm_loss": the total}.
    """
    parts = torch.zeros(stack.partition.blocks, sum(len(y) for y, _ in batches), dtype=torch.float64)
    for level in reversed(range(levels)):  # noisiest first, like the blocks
        sigma = float(stack.partition.noise.inverse_cdf((level + 0.5) / levels))
        generator, errors = torch.Generator().manual_seed(seed * levels + level), []
        for y, labels in batches:
            z = y + sigma * torch.randn(y.shape, generator=generator).to(y.device)
            errors.append((stack.denoiser(labels)(z, sigma) - y).square().flatten(1).mean(1).cpu().double())
        weight = float(edm_weight(torch.tensor(sigma, dtype=torch.float64), sigma_data))
        parts[stack.partition.route(sigma)] += weight / levels * torch.cat(errors)
    test, validation = parts[:, TEST].mean(1), parts[:, VALIDATION].mean(1)
    metrics = {"edm_loss": float(test.sum()), "edm_loss_by_block": test.tolist()}
    return metrics | {"validation_edm_loss": float(validation.sum())}
