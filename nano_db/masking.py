"""Noise that masks: masked diffusion of discrete sequences (MD4: Shi et al. 2024; MDLM: Sahoo et al. 2024).

At time t each token is unmasked with probability alpha(t), which falls from alpha(0) = 1 to alpha(1) = 0; a mask token
takes the place of the others. A network predicts the masked ones from the unmasked ones. In nats per sequence,

    -ln p(x) <= integral over t of -alpha'(t) / (1 - alpha(t)) * E[sum over masked tokens of -ln p(token | unmasked)]
             =  integral over alpha of E[sum over masked tokens of -ln p(token | unmasked)] / (1 - alpha),

so equal decrements of alpha are equal shares of the loss of a predictor that ignores the context. This gives the
partition: block b owns alpha in [b/B, (b+1)/B), block 0 the most masked (the paper numbers them the other way round).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.sampler import draw

MIN_MASKED = 1e-3  # the loss weight 1 / (1 - alpha) stops growing here; one token in a thousand is masked then


@dataclass(frozen=True)
class MaskSchedule:
    """alpha(t) and its inverse, float64. kind: "linear" is 1 - t, "cosine" is 1 - cos(pi/2 * (1 - t))."""

    kind: str = "linear"

    def __post_init__(self):
        assert self.kind in ("linear", "cosine"), self.kind

    def alpha(self, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        return 1 - t if self.kind == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))

    def slope(self, t):
        """alpha'(t), negative."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return -torch.ones_like(t) if self.kind == "linear" else -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def time(self, alpha):
        """The t at which a share alpha is unmasked."""
        alpha = torch.as_tensor(alpha, dtype=torch.float64)
        return 1 - alpha if self.kind == "linear" else 1 - 2 / math.pi * torch.acos(1 - alpha)


def alpha_range(b, blocks, overlap=0.0):
    """(low, high) of the alpha that block b of B owns; with overlap, of what it trains on: wider by overlap / B at both
    ends.
    """
    return max(0.0, (b - overlap) / blocks), min(1.0, (b + 1 + overlap) / blocks)


def block_at(alpha, blocks):
    """The block that is active at alpha; an alpha on an edge belongs to the less masked block."""
    return max(b for b in range(blocks) if alpha_range(b, blocks)[0] <= alpha + 1e-9)


def low_discrepancy_times(count, t_low, t_high, device="cpu"):
    """Low-discrepancy times: one shared offset u, t_i = (u + i / n) mod 1, scaled to the interval. (count,) float64"""
    offset = torch.rand((), dtype=torch.float64, device=device)
    return t_low + (t_high - t_low) * ((offset + torch.arange(count, dtype=torch.float64, device=device) / count) % 1)


def mask_tokens(x, alpha, mask_token, generator=None):
    """Mask each token of x (B, T) with probability 1 - alpha, (B,). Returns (x with mask tokens, where they are)."""
    chance = torch.rand(x.shape, generator=generator, device="cpu" if generator else x.device).to(x.device)
    masked = chance >= alpha.float().to(x.device)[:, None]
    return torch.where(masked, mask_token, x), masked


class MaskedBlock(nn.Module):
    """A denoiser for one interval of masking; with the whole interval (0, 1), the end-to-end baseline.

    network(x, t) -> logits (B, T, V) for x (B, T) with masks as token V, and times t (B,). span: of alpha, in training.
    """

    def __init__(self, network, schedule, classes, span=(0.0, 1.0)):
        super().__init__()
        self.network, self.schedule, self.classes, self.span = network, schedule, classes, span

    def nats(self, x, t, generator=None):
        """-ln p of the masked tokens at times t (B,), each sequence's sum divided by its expected number of them. (B,)

        Its mean over all of [0, 1] in alpha is the upper bound in nats per token.
        """
        alpha = self.schedule.alpha(t)
        noisy, masked = mask_tokens(x, alpha, self.classes, generator)
        logits = self.network(noisy, t.float().to(x.device)).float()
        nats = F.cross_entropy(logits.transpose(1, 2), x, reduction="none") * masked  # (B, T)
        return nats.sum(1) / ((1 - alpha).clamp(min=MIN_MASKED).float().to(x.device) * x.shape[1])

    def loss(self, x):
        """The block's part of the bound, as a mean over its span: times spread evenly, weighted by -alpha'."""
        low, high = self.span
        t_low, t_high = float(self.schedule.time(high)), float(self.schedule.time(low))  # alpha falls as t grows
        where = "cpu" if x.device.type == "mps" else x.device  # MPS has no float64
        t = low_discrepancy_times(len(x), t_low, t_high, where)
        weight = -self.schedule.slope(t) * (t_high - t_low) / (high - low)  # (B,), 1 on average
        return (weight.float().to(x.device) * self.nats(x, t)).mean()


@torch.no_grad()
def score_masked(blocks, batches, levels=16, generator=None):
    """The upper bound in nats per token, split by block, (blocks,) float64: each at `levels` midpoints of its interval.

    batches: yields x (n, T) to average over.
    """
    nats, sequences = torch.zeros(len(blocks), dtype=torch.float64), 0
    for x in batches:
        for b, block in enumerate(blocks):
            low, high = alpha_range(b, len(blocks))
            for i in range(levels):
                alpha = low + (high - low) * (i + 0.5) / levels
                t = block.schedule.time(alpha).expand(len(x))
                nats[b] += float(block.nats(x, t, generator).cpu().double().sum()) * (high - low) / levels
        sequences += len(x)
    return nats / sequences


def unmasked_share(x, mask_token):
    """The share of x that is not masked: the alpha at which sampling begins."""
    return float((x != mask_token).double().mean())


@torch.no_grad()
def unmask(blocks, x, steps, temperature=1.0, generator=None):
    """Yield (alpha, x) after each of `steps` steps from a sequence x (B, T), whose mask tokens are to be filled in.

    From alpha to alpha_next each masked token is revealed with probability (alpha_next - alpha) / (1 - alpha),
    independently of the others; the block that owns alpha is active. Unmasked tokens never change.
    """
    classes = blocks[0].classes
    start = unmasked_share(x, classes)
    for step in range(steps):
        alpha, alpha_next = (start + (1 - start) * i / steps for i in (step, step + 1))
        block = blocks[block_at(alpha, len(blocks))]
        t = block.schedule.time(alpha).float().to(x.device).expand(len(x))
        log_p = (block.network(x, t).float() / temperature).log_softmax(-1)
        chance = torch.rand(x.shape, dtype=torch.float64, generator=generator)
        share = (alpha_next - alpha) / (1 - alpha) if alpha < 1 else 1.0  # alpha = 1: nothing was masked
        revealed = (x == classes) & (chance < share).to(x.device)
        x = torch.where(revealed, draw(log_p, generator), x)
        yield alpha_next, x
