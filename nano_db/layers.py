"""Transformer layers shared by all architectures: pre-norm, with rotary positions or without, modulated by the noise
level or not.

A layer is conditioned on the noise level by adaLN-Zero (Peebles & Xie 2023): shift, scale and gate of both residual
branches are linear in a conditioning vector, and zero at the start, so that a new layer is the identity.
Unconditioned layers (the baseline's, or a trunk's) are the identity at the start by zero output projections.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nano_db.errors import UsageError


def layer_norm(h):
    """LayerNorm (Ba et al. 2016) over the features, without weights, as in DiT: one kernel, on CPUs too."""
    return F.layer_norm(h, h.shape[-1:])


def rotary_angles(positions, head_width, base=10_000.0):
    """Cosines and sines of rotary position embedding (Su et al. 2021): two (T, head_width) tensors for `rotate`."""
    frequencies = base ** (-torch.arange(0, head_width, 2, device=positions.device) / head_width)
    angles = positions[:, None] * frequencies  # (T, head_width / 2)
    return torch.cat([angles.cos(), angles.cos()], dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def rotate(heads, rotary):
    """Turn each pair of channels (i, i + head_width / 2) of (B, H, T, head_width) by its position's angle."""
    cos, sin = (part.to(heads.dtype) for part in rotary)
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def causal_mask(T, past, device):
    """(T, past + T): True where query t may look, at all of the past and at new positions up to t."""
    return torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)


class Cache:
    """Keys and values of earlier positions, for generation: a pair of (B, H, T, head_width) for each layer."""

    def __init__(self):
        self.pairs = {}

    @property
    def length(self):
        return self.pairs[0][0].shape[2] if self.pairs else 0

    def extend(self, layer, keys, values, keep):
        """Append to `layer`'s pair; return all keys and values, but remember only the first `keep` of the new ones."""
        if layer in self.pairs:
            old_keys, old_values = self.pairs[layer]
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
            keep += old_keys.shape[2]
        self.pairs[layer] = keys[:, :, :keep], values[:, :, :keep]
        return keys, values


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        if width % (2 * heads):
            raise UsageError(f"--width {width} must be a multiple of {2 * heads}: {heads} heads of an even width each")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, h, rotary, mask, causal, remember):
        B, T, D = h.shape
        q, k, v = self.qkv(h).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if remember is not None:
            k, v = remember(k, v)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(h.transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    """h <- h + attention(norm(h)); h <- h + mlp(norm(h)). With cond_width, both branches are modulated (adaLN-Zero).

    sandwich: normalise each sum, too (Geiping et al. 2025), which keeps a layer stable that is applied again and again.
    """

    def __init__(self, width, heads, cond_width=0, dropout=0.0, sandwich=False):
        super().__init__()
        self.norm_sum = layer_norm if sandwich else nn.Identity()
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

    def forward(self, h, rotary=None, cond=None, mask=None, causal=False, remember=None):
        """h (B, T, D); rotary: angles of the positions, or None; cond (B, cond_width) where the layer is conditioned;
        mask (T, keys), True where to look.
        """
        attend = (rotary, mask, causal, remember)
        if self.modulation is None:
            h = self.norm_sum(h + self.dropout(self.attention(layer_norm(h), *attend)))
            return self.norm_sum(h + self.dropout(self.mlp(layer_norm(h))))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(cond))[:, None].chunk(6, dim=-1)
        h = self.norm_sum(h + gate_a * self.dropout(self.attention(layer_norm(h) * (1 + scale_a) + shift_a, *attend)))
        return self.norm_sum(h + gate_m * self.dropout(self.mlp(layer_norm(h) * (1 + scale_m) + shift_m)))


def open_gates(bias):
    """The bias (6 * width,) of a layer's modulation with both gates at 1 (see Layer.forward for the order). With new
    weights, which are zero, the modulated layer then computes what an unmodulated one computes.
    """
    opened = bias.clone().view(6, -1)
    opened[[2, 5]] = 1.0
    return opened.flatten()


class CheckpointedLayer(Layer):
    """A Layer that keeps its inputs alone for the backward pass (evaluate_again)."""

    def forward(self, *inputs, **named):
        return evaluate_again(super().forward, *inputs, **named)


def checkpoint_layers(module):
    """Turn all Layers of `module` into CheckpointedLayers, in place."""
    for layer in module.modules():
        if isinstance(layer, Layer):
            layer.__class__ = CheckpointedLayer


def show_in_parts(network, rows):
    """Let `network` see `rows` samples of a batch at a time, and keep their inputs and its answer alone for the
    backward pass (evaluate_again). What is random in a loss was drawn for the whole batch: the loss stays what it is.
    """
    whole = type(network)

    def forward(self, *inputs, **named):
        if rows >= len(inputs[0]) or not torch.is_grad_enabled():
            return whole.forward(self, *inputs, **named)
        parts = zip(*(tensor.split(rows) for tensor in inputs), strict=True)
        return torch.cat([evaluate_again(whole.forward, self, *part, **named) for part in parts])

    network.__class__ = type(whole.__name__, (whole,), {"forward": forward})


def evaluate_again(function, *inputs, **named):
    """function(*inputs, **named). Its inputs alone are kept for the backward pass, where it is evaluated again (Chen et
    al. 2016, "checkpointing").
    """
    return checkpoint(function, *inputs, use_reentrant=False, **named)


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> conditioning vector (B, width): sines and cosines, then a small MLP.

    Keep the width narrow (d/6, as in the released code): at full width the modulations would add 6 d^2 weights to a
    layer's 12 d^2, and eat half of what training by blocks saves.
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
