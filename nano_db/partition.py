"""Who owns which noise levels: edges between blocks, their overlap in training, routing; and who owns which layers.

Block 0 is the noisiest, runs first, and stands nearest the input. Edges descend: edges[0] = sigma_max, edges[B] =
sigma_min, and block b owns (edges[b+1], edges[b]]. (Masked diffusion has no sigma; it is cut in masking.alpha_range.)
"""

import math
from dataclasses import dataclass

import torch

from nano_db.errors import UsageError
from nano_db.schedule import LogNormal, quantiles

KINDS = ("probability", "uniform")


@dataclass(frozen=True)
class Partition:
    """edges: B + 1 descending noise levels. overlap: the paper's gamma, how far training reaches beyond the edges.
    noise: the distribution that is cut (schedule.py).
    """

    edges: tuple[float, ...]
    overlap: float = 0.0
    noise: LogNormal | None = None

    @property
    def blocks(self):
        return len(self.edges) - 1

    def interval(self, b):
        """(low, high) of the noise levels that block b serves."""
        return self.edges[b + 1], self.edges[b]

    def route(self, sigma):
        """Index of the block that serves noise level(s) sigma: an int for a float, else a tensor of sigma's shape.

        Levels above the range belong to block 0, levels below it to the last block.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64)
        block = (sigma[..., None] <= inner).sum(-1)  # one edge passed, one block further
        return block if block.dim() else int(block)

    def training_range(self, b):
        """(low, high) of what block b trains on: its interval, stretched at both ends by a = (high / low)^overlap."""
        low, high = self.interval(b)
        a = (high / low) ** self.overlap
        return max(low / a, self.edges[-1]), min(high * a, self.edges[0])


def make_partition(noise, blocks, kind="probability", overlap=0.0):
    """Cut the range of `noise` into blocks. kind: "probability" gives all blocks the same probability (the paper's
    way), "uniform" the same width in ln sigma (its ablation).
    """
    assert kind in KINDS, kind
    if kind == "probability":
        return Partition(tuple(quantiles(noise, blocks).tolist()), overlap, noise)
    top, bottom = math.log(noise.sigma_max), math.log(noise.sigma_min)
    inner = [math.exp(top + (bottom - top) * b / blocks) for b in range(1, blocks)]
    return Partition((noise.sigma_max, *inner, noise.sigma_min), overlap, noise)


def sampling_grid(partition, steps):
    """The noise levels of a sampling trajectory: `steps` descending levels, then 0. (steps + 1,) float64

    Each block gets the same number of steps; any remainder goes to the first ones. A block's levels lie in its own
    interval, spaced at equal probability under p_noise from its top edge. So every block is used, whatever the edges.
    """
    if steps < partition.blocks:
        raise UsageError(f"{steps} sampling steps: each of the {partition.blocks} blocks needs at least one")
    parts, noise = [], partition.noise
    for b in range(partition.blocks):
        (low, high), count = partition.interval(b), steps // partition.blocks + (b < steps % partition.blocks)
        passed = torch.arange(count, dtype=torch.float64)
        sigmas = noise.inverse_cdf((noise.cdf(high) * (count - passed) + noise.cdf(low) * passed) / count)
        sigmas[0] = high  # exact to the last bit
        parts.append(sigmas.clamp(low, high))  # far out in a tail, where the cdf is flat, its inverse is inaccurate
    return torch.cat([*parts, torch.zeros(1, dtype=torch.float64)])


def split_layers(layers, blocks, split=""):
    """Layers of each block, noisiest first: as even as possible (the first ones get any remainder), or like "3,6,3"."""
    if blocks > layers:
        raise UsageError(f"{blocks} blocks are too many for {layers} layers: every block needs a layer of its own")
    if not split:
        return [layers // blocks + (b < layers % blocks) for b in range(blocks)]
    counts = {str(count): count for count in range(1, layers + 1)}
    parts = [counts.get(part.strip(), 0) for part in split.split(",")]
    if len(parts) != blocks or sum(parts) != layers or 0 in parts:
        wanted = f"{blocks} whole numbers above 0, which add up to {layers} layers"
        raise UsageError(f"the layer split {split!r} must be {wanted}, like 3,6,3 for 12 layers in 3 blocks")
    return parts
