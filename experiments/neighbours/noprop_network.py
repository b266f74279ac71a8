"""NoProp's network: a small CNN that sees an image, a noisy label, and perhaps the time; and what its copies share."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.heads import make_target_embeddings
from nano_db.layers import NoiseEmbedding


class CNN(nn.Module):
    """NoProp's block: image x (B, C, H, W), noisy label z (B, d), and time (B,) if `timed` -> (B, out)."""

    def __init__(self, shape, d, out, c, timed=False, normed=True):
        super().__init__()
        norm = nn.BatchNorm1d if normed else nn.Identity
        pool, drop, relu, flat = nn.MaxPool2d(2), nn.Dropout(0.2), nn.ReLU(), 4 * c * (shape[1] // 4) * (shape[2] // 4)
        one, two, three = (nn.Conv2d(*pair, 3, padding=1) for pair in ((shape[0], c), (c, 2 * c), (2 * c, 4 * c)))
        convolutions = one, relu, pool, drop, two, relu, drop, three, relu, pool, drop
        self.image = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(flat, 8 * c), norm(8 * c))
        self.label = nn.Sequential(nn.Linear(d, 8 * c), norm(8 * c), relu)
        self.deeper = nn.Sequential(nn.Linear(8 * c, 8 * c), norm(8 * c), relu, nn.Linear(8 * c, 8 * c), norm(8 * c))
        self.time = nn.Sequential(NoiseEmbedding(8 * c, features=64), relu) if timed else None
        first = nn.Linear((24 if timed else 16) * c, 8 * c), norm(8 * c), relu
        self.both = nn.Sequential(*first, nn.Linear(8 * c, 4 * c), norm(4 * c), relu, nn.Linear(4 * c, out))

    def forward(self, x, z, time=None, seen=None):
        """seen: self.image(x), if it is known already: it does not change during inference."""
        seen, h = self.image(x) if seen is None else seen, self.label(z)
        times = [] if time is None else [self.time(time)]
        return self.both(torch.cat([seen, h + self.deeper(h), *times], dim=-1))


def noisy(u, abar):
    return abar**0.5 * u + (1 - abar) ** 0.5 * torch.randn_like(u)


def kl_to_noise(u, abar):
    """KL(q(z_0 | y) || N(0, I)), the mean over (B, d) embeddings u."""
    d = u.shape[-1]
    return 0.5 * (abar * u.square().sum(-1) - d * (abar + math.log(1 - abar))).mean()


class Shared(nn.Module):
    """What NoProp's blocks train together: the embeddings u_y, (V, d), and the output projection theta_out
    (d -> V). It starts as 10 <z, u_y> / length^2: from the usual initialisation it needs most of a short run to
    become confident. length: initial length of the embeddings.
    """

    def __init__(self, classes, d, length=1.0):
        super().__init__()
        codes = make_target_embeddings(classes, d)
        self.u, self.out = nn.Parameter(length * codes), nn.Linear(d, classes)
        self.out.weight.data = 10 / length * codes

    def loss(self, y, first, last):
        """-ln p(y | z_1) + KL(q(z_0 | y) || N(0, I)). first, last: abar of z_0 and z_1."""
        u = self.u[y]
        return F.cross_entropy(self.out(noisy(u, last)), y) + kl_to_noise(u, first)
