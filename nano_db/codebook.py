"""Discrete targets: what a label or token is denoised to, and the two heads that turn features into p(y | z, x).

The codebook E holds one fixed unit vector a class, derived from the seed: learned embeddings can shrink the noise's
task by collapsing to a point (CDCD, Dieleman et al. 2022), fixed ones cannot, and every block knows them without
being told.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.schedule import edm_coefficients


def make_codebook(classes, width, seed=0):
    """(V, d) unit-norm rows: orthonormal where V <= d, else normalised Gaussian ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(classes, width, dtype=torch.float64, generator=generator)
    rows = torch.linalg.qr(rows.T).Q.T if classes <= width else F.normalize(rows, dim=-1)
    return rows.float().contiguous()


def broadcast(sigma, like):
    """sigma (B,) or a float, shaped (B, 1, ..., 1) to multiply `like` (B, ...)."""
    sigma = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    return sigma.reshape(-1, *[1] * (like.dim() - 1)) if sigma.dim() else sigma


def log_likelihood(z, sigma, codebook):
    """ln p(z | y) for every class y, up to a term all classes share: <z, E[y]> / sigma^2. z (B, ..., d) -> (B, ..., V)

    Unit norms make it linear: -|z - E[y]|^2 / (2 sigma^2) differs from it by terms without y. Always float32:
    dividing by sigma^2 magnifies the rounding of a bfloat16 product into whole nats.
    """
    with torch.autocast(z.device.type, enabled=False):
        return z.float() @ codebook.T / broadcast(sigma, z.float()).square()


class DiscreteHead(nn.Module):
    """What both heads share: the codebook, a linear readout (width -> V) and the cross-entropy.

    The contract of a head, for block.py: clean(y) is the target that gets noised; head(features, z, sigma) is the
    answer, here the logits of p(y | z, x); loss(answer, y) is one number a sample, (B,).
    """

    def __init__(self, codebook):
        super().__init__()
        self.register_buffer("codebook", codebook, persistent=False)  # from the seed, so it needs no place in a file
        self.readout = nn.Linear(codebook.shape[1], codebook.shape[0], bias=False)
        nn.init.normal_(self.readout.weight, std=0.02)

    def clean(self, y):
        return self.codebook[y]  # (B, ...) -> (B, ..., d)

    def loss(self, logits, y):
        nats = F.cross_entropy(logits.float().flatten(0, -2), y.flatten(), reduction="none")
        return nats.view(len(y), -1).mean(-1)  # (B,)


class PosteriorHead(DiscreteHead):
    """Bayes' rule as an output layer (ours): logits = readout(features) + <z, E> / sigma^2.

    Given z = E[y] + sigma * eps, p(y | z, x) ~ p(y | x) * exp(<z, E[y]> / sigma^2) exactly. What the noise tells is
    added in closed form, and the network learns only what it cannot tell: p(y | x).
    """

    def log_prior(self, features):
        """The block's word on ln p(y | x): the logits without the likelihood term, normalised. (B, ..., V)"""
        return self.readout(features).float().log_softmax(-1)

    def forward(self, features, z, sigma, temperature=1.0):
        return self.readout(features).float() / temperature + log_likelihood(z, sigma, self.codebook)


class PaperHead(DiscreteHead):
    """The paper's head: EDM's D = c_skip * z + c_out * F in the embedding space, then a linear readout to logits."""

    def __init__(self, codebook, sigma_data=0.5):
        super().__init__(codebook)
        self.sigma_data = sigma_data

    def forward(self, features, z, sigma, temperature=1.0):
        c_skip, c_out, _, _ = edm_coefficients(broadcast(sigma, z), self.sigma_data)
        return self.readout(c_skip * z + c_out * features).float() / temperature


def make_head(kind, codebook, sigma_data):
    """The head that --head names: "posterior" or "paper"."""
    return PosteriorHead(codebook) if kind == "posterior" else PaperHead(codebook, sigma_data)
