"""A plain GPT, as a yardstick for train_gpt.py: what everybody writes first, and nothing of ours.

Learned positions, LayerNorm without bias, one matrix for queries, keys and values, GELU, an output that shares the
embedding's weights (GPT-2, in nanoGPT's form).
"""

import torch.nn as nn
import torch.nn.functional as F


class PlainLayer(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.before_attention, self.before_mlp = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.mlp = nn.Sequential(up, nn.GELU(), down)

    def forward(self, h):
        q, k, v = self.qkv(self.before_attention(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.dropout(self.out(found.transpose(1, 2).flatten(2)))  # (B, T, width)
        return h + self.dropout(self.mlp(self.before_mlp(h)))


class PlainGPT(nn.Module):
    def __init__(self, classes, settings):
        super().__init__()
        self.tokens, self.positions = (nn.Embedding(n, settings.width) for n in (classes, settings.seq_len))
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        sizes = settings.width, settings.heads, settings.dropout
        self.layers = nn.Sequential(*(PlainLayer(*sizes) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width, bias=False)

    def forward(self, x):
        """Logits (B, T, V) of the tokens after x (B, T)."""
        h = self.layers(self.tokens(x) + self.positions.weight[: x.shape[1]])
        return self.norm(h) @ self.tokens.weight.T


class Trained(nn.Module):
    """The network with its loss, in the form of block.EndToEnd."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def loss(self, x, y):
        return F.cross_entropy(self.network(x).float().flatten(0, 1), y.flatten())


def build(b, settings, text, partition):
    return Trained(PlainGPT(text.tokenizer.classes, settings))
