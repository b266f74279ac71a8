"""Transformer layers shared by all architectures: pre-norm, with or without rotary positions and modulation.

A layer is conditioned on the noise level by adaLN-Zero (Peebles & Xie 2023): shift, scale and gate of both residual
branches are linear in a conditioning vector, and zero at the start, so that a new layer is the identity. Unconditioned
layers (of a baseline for labels and tokens, or of a trunk) start as the identity because their output projections are
zero. (train_looped.py initialises its layers in Huginn's way, not as the identity.)
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nano_db.errors import UsageError


def rms_norm(h):
    """RMSNorm (Zhang & Sennrich 2019) over the features, without weights."""
    if h.device.type != "cpu":
        return F.rms_norm(h, h.shape[-1:])  # one kernel on a GPU; on a CPU it would be many passes over h
    with torch.autocast("cpu", enabled=False):  # float32 throughout: bfloat16 would be too coarse
        mean_square = torch.linalg.vecdot(h.float(), h.float()) / h.shape[-1]
    return h * (mean_square + torch.finfo(torch.float32).eps).rsqrt()[..., None].to(h.dtype)


def rotary_angles(positions, head_width, base=10_000.0):
    """Cosines and sines of rotary position embedding (Su et al. 2021): two (T, head_width) tensors for `rotate`."""
    frequencies = base ** (-torch.arange(0, head_width, 2, device=positions.device) / head_width)
    angles = positions[:, None] * frequencies  # (T, head_width / 2)
    return torch.cat([angles.cos(), angles.cos()], dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def rotate(heads, rotary):
    """Turn each pair of channels (i, i + head_width / 2) of (B, H, T, head_width) by its position's angle."""
    cos, sin = rotary
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def causal_mask(T, past, device):
    """(T, past + T): True where query t may attend: to all of the past, and to new positions up to t."""
    return torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)


class Cache:
    """Keys and values of earlier positions, for generation: pairs of (B, H, T, head_width), in the order of the forward
    pass. A layer that is applied several times has several pairs.
    """

    def __init__(self):
        self.pairs, self.keep, self.layer = [], 0, 0

    def begin(self, new):
        """Call before a forward pass of which `new` positions are to be kept. Returns how many are cached already."""
        past = self.pairs[0][0].shape[2] if self.pairs else 0
        self.keep, self.layer = past + new, 0
        return past

    def extend(self, keys, values):
        """Append to the pair of the next layer; return all keys and values."""
        if self.layer < len(self.pairs):
            old_keys, old_values = self.pairs[self.layer]
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        pair = keys[:, :, : self.keep], values[:, :, : self.keep]
        self.pairs[self.layer : self.layer + 1] = [pair]
        self.layer += 1
        return keys, values


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        if width % (2 * heads):
            raise UsageError(f"width {width} is not a multiple of {2 * heads}: {heads} heads need an even width each")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, h, rotary, mask, causal, cache):
        B, T, D = h.shape
        q, k, v = self.qkv(h).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if rotary is not None:
            rotary = [part.to(q.dtype) for part in rotary]  # once for both
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(h.transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    """h <- h + attention(norm(h)) * scale; h <- h + mlp(norm(h)) * scale. With cond_width, both branches are modulated
    (adaLN-Zero).

    depth: layers of the network, L (0: scale 1). Then scale = 1 / sqrt(2 L), so that the sum of the 2 L branches has
    the same size in networks of any depth, and deep ones learn as fast as shallow ones. GPT-2 (Radford et al. 2019)
    scales the first weights instead. Here they or their gates start at zero, so the factor stays, as in depth-muP (Yang
    et al. 2023, arXiv 2310.02244). sandwich: also normalise each sum (Geiping et al. 2025), to keep a repeated layer
    stable.
    """

    def __init__(self, width, heads, cond_width=0, dropout=0.0, sandwich=False, depth=0):
        super().__init__()
        self.scale = (2 * depth) ** -0.5 if depth else 1.0
        self.recomputes = False  # True: keep only the inputs for the backward pass
        self.norm_sum = rms_norm if sandwich else nn.Identity()
        self.attention = Attention(width, heads)
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.mlp = nn.Sequential(up, nn.GELU(), down)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(cond_width, 6 * width) if cond_width else None
        if cond_width:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        else:
            nn.init.zeros_(self.attention.out.weight)
            nn.init.zeros_(down.weight)

    def forward(self, h, rotary=None, cond=None, mask=None, causal=False, cache=None):
        """h (B, T, D); rotary: angles of the positions, or None; cond (B, cond_width) if the layer is conditioned;
        mask (T, keys), True where a query may attend; cache: see Cache.
        """
        if self.recomputes:
            return recompute(self.add_branches, h, rotary, cond, mask, causal, cache)
        return self.add_branches(h, rotary, cond, mask, causal, cache)

    def add_branches(self, h, rotary, cond, mask, causal, cache):
        attend = (rotary, mask, causal, cache)
        if self.modulation is None:
            h = self.norm_sum(torch.add(h, self.dropout(self.attention(rms_norm(h), *attend)), alpha=self.scale))
            return self.norm_sum(torch.add(h, self.dropout(self.mlp(rms_norm(h))), alpha=self.scale))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(cond))[:, None].chunk(6, dim=-1)
        branch = self.dropout(self.attention(rms_norm(h) * (1 + scale_a) + shift_a, *attend))
        h = self.norm_sum(torch.addcmul(h, gate_a, branch, value=self.scale))
        branch = self.dropout(self.mlp(rms_norm(h) * (1 + scale_m) + shift_m))
        return self.norm_sum(torch.addcmul(h, gate_m, branch, value=self.scale))


def open_gates(bias):
    """The bias (6 * width,) of a layer's modulation with both gates at 1: since the new weights are zero, the
    layer then computes the same as an unmodulated one.
    """
    opened = bias.clone().view(6, -1)
    opened[[2, 5]] = 1.0
    return opened.flatten()


def checkpoint_layers(module):
    """Let all Layers of `module` keep only their inputs for the backward pass."""
    for layer in module.modules():
        if isinstance(layer, Layer):
            layer.recomputes = True


def recompute(function, *inputs, **named):
    """function(*inputs, **named), evaluated again in the backward pass (activation checkpointing, Chen et al. 2016)."""
    if _watcher and torch.is_grad_enabled():
        return _watcher(function, *inputs, **named)
    return checkpoint(function, *inputs, use_reentrant=False, **named)


_watcher = None


@contextmanager
def watch_recomputing(watcher):
    """Within this context, watcher(function, *inputs, **named) replaces `recompute`, in order to count bytes."""
    global _watcher
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> conditioning vector (B, width): sines and cosines, then a small MLP.

    For labels and tokens keep the width narrow (d/6, as in the released code): at full width the modulations would add
    6 d^2 weights to a layer's 12 d^2, and make a block half as large again as the same layers of the baseline, which
    sees no noise. (A DiT's baseline is modulated as well, so there the width is d.)
    """

    def __init__(self, width, features=32):
        super().__init__()
        # c_noise = ln(sigma)/4 spans about 3 units: wavelengths from 25 units down to 0.1 tell its values apart.
        frequencies = torch.logspace(math.log10(0.25), math.log10(64), features // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise):
        angles = c_noise[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
