"""Heads: what turns a network's features into the answer of a block.

For labels and tokens the clean target is a point: the target embedding E[y], one fixed unit vector per class, derived
from the seed. Learned embeddings can make the task easy by collapsing to a point (CDCD, Dieleman et al. 2022). Fixed
ones cannot, and every block knows them without being told.

A head is a module with

    clean(y)                       the clean target, which gets noised: (B, ..., d)
    head(features, z, sigma, temperature)
                                   the answer: logits of p(y | z, x), or the denoised target D
    loss(features, z, sigma, y)    how wrong the answer is, one number per sample: (B,)
    network_sees_z                 True: the network is shown z and sigma (block.py); False: it reads only x, and only
                                   the head sees them (DenoisingHead)
    sigma_data                     EDM's constant for the clean target's standard deviation
    target_embeddings, residual    for stack.py: the E[y] of all classes; the network's part of the logits, without the
                                   likelihood term (posterior and denoising head)
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.layers import NoiseEmbedding, recompute
from nano_db.schedule import edm_coefficients

MOST_LOGITS = 2**24  # in memory at a time: 64 MiB in float32


def make_target_embeddings(classes, width, seed=0):
    """(V, d) unit-norm rows: orthonormal if V <= d, else normalised Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(classes, width, dtype=torch.float64, generator=generator)
    rows = torch.linalg.qr(rows.T).Q.T if classes <= width else F.normalize(rows, dim=-1)
    return rows.float().contiguous()


def broadcast(sigma, like):
    """sigma (B,) or a float, shaped (B, 1, ..., 1) to multiply `like` (B, ...)."""
    if not torch.is_tensor(sigma):
        return torch.full((), sigma, dtype=like.dtype, device=like.device)  # on its device: copying makes a GPU wait
    return sigma.to(like).reshape(-1, *[1] * (like.dim() - 1))


def log_likelihood(z, sigma, target_embeddings):
    """ln p(z | y) for every class y, up to a term all classes share: <z, E[y]> / sigma^2. z (B, ..., d) -> (B, ..., V)

    Unit norms make it linear: -|z - E[y]|^2 / (2 sigma^2) differs from it by terms without y. Always float32:
    dividing by sigma^2 magnifies the rounding of a bfloat16 product into whole nats.
    """
    with torch.autocast(z.device.type, enabled=False):
        return z.float() @ target_embeddings.T / broadcast(sigma, z.float()).square()


def mean_embedding(log_p, target_embeddings):
    """D, the mean of E[y] under p: ln p (B, ..., V) -> (B, ..., d). Always float32: the likelihood bound would
    divide the squared rounding error of a bfloat16 product by sigma^2.
    """
    with torch.autocast(log_p.device.type, enabled=False):
        return log_p.float().exp() @ target_embeddings


def cross_entropy(logits_of, y, *inputs, classes):
    """-ln p(y) in nats, (B, ...), from logits_of(*inputs) of shape (B, ..., V); V is `classes`. If the logits are
    more than MOST_LOGITS, they are computed for part of the batch at a time, and recomputed in the backward pass.
    """
    rows = max(1, MOST_LOGITS // (classes * y[0].numel()))  # samples at a time
    if rows >= len(y):
        return F.cross_entropy(logits_of(*inputs).float().flatten(0, -2), y.flatten(), reduction="none").view_as(y)
    parts = zip(*(tensor.split(rows) for tensor in (y, *inputs)), strict=True)
    return torch.cat([recompute(partial(cross_entropy, logits_of, classes=classes), *part) for part in parts])


class DiscreteHead(nn.Module):
    """What the heads for labels and tokens share. target_embeddings: (V, d), see make_target_embeddings."""

    network_sees_z, sigma_data = True, 0.5  # as in the paper; a coordinate of a unit vector has 1 / sqrt(d)

    def __init__(self, target_embeddings):
        super().__init__()
        classes, width = target_embeddings.shape
        self.register_buffer("target_embeddings", target_embeddings, persistent=False)  # made from the seed: not saved
        self.output_projection = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.output_projection.weight, std=0.02)

    def clean(self, y):
        return self.target_embeddings[y]  # (B, ...) -> (B, ..., d)

    def loss(self, features, z, sigma, y):
        nats = cross_entropy(self, y, features, z, sigma, classes=len(self.target_embeddings))
        return nats.view(len(y), -1).mean(-1)  # (B,)


class PosteriorHead(DiscreteHead):
    """Bayes' rule as an output layer (ours): logits = residual + <z, E> / sigma^2.

    Given z = E[y] + sigma * eps, p(y | z, x) ∝ p(y | x) * exp(<z, E[y]> / sigma^2) exactly. What z tells about y is
    added in closed form, and the network learns only the residual, ln p(y | x), which z cannot tell.
    """

    def residual(self, features, z, sigma):
        """The network's part of the logits, (B, ..., V)."""
        return self.output_projection(features).float()

    def forward(self, features, z, sigma, temperature=1.0):
        return self.residual(features, z, sigma) / temperature + log_likelihood(z, sigma, self.target_embeddings)


class DenoisingHead(PosteriorHead):
    """A small MLP that sees the trunk's features, the noisy target and the noise level (ours; recipe nano).

    The trunk reads only x and is evaluated once, the head at each sampling step. The idea is that of MAR's diffusion
    head (Li et al. 2024, arXiv 2406.11838), with Bayes' rule as its output layer.
    """

    network_sees_z = False

    def __init__(self, target_embeddings):
        super().__init__(target_embeddings)
        width = target_embeddings.shape[1]
        cond_width = max(8, width // 6)  # narrow, for the reason given in layers.NoiseEmbedding
        self.noise_embedding = NoiseEmbedding(cond_width)
        self.modulation = nn.Linear(cond_width, 2 * width)
        self.from_z = nn.Linear(width, width, bias=False)
        hidden = 3 * width // 4  # narrow, so that its activations do not cancel the memory saved
        self.up, self.out = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        for weight in (self.modulation.weight, self.modulation.bias, self.from_z.weight, self.out.weight):
            nn.init.zeros_(weight)  # at the start the features pass unchanged, and z has no effect

    def residual(self, features, z, sigma):
        """features and z (B, ..., d), sigma (B,)."""
        _, _, c_in, c_noise = edm_coefficients(sigma, self.sigma_data)
        modulation = self.modulation(self.noise_embedding(c_noise))  # (B, 2d)
        scale, shift = modulation.view(len(z), *[1] * (z.dim() - 2), -1).chunk(2, dim=-1)
        u = features * (1 + scale) + shift + self.from_z(broadcast(c_in, z) * z)
        return self.output_projection(features + self.out(F.relu(self.up(u)))).float()


class PaperHead(DiscreteHead):
    """The paper's head: EDM's D = c_skip * z + c_out * F in the embedding space (not yet the D of the walk, the
    mean embedding), then a linear projection to logits.
    """

    def forward(self, features, z, sigma, temperature=1.0):
        c_skip, c_out, _, _ = edm_coefficients(broadcast(sigma, z), self.sigma_data)
        return self.output_projection(c_skip * z + c_out * features).float() / temperature


HEADS = {"denoising": DenoisingHead, "posterior": PosteriorHead, "paper": PaperHead}


class EDMHead(nn.Module):
    """The head for continuous targets such as pixels: D = c_skip * z + c_out * F (EDM, eq. 7), with the network's
    features as F. Their target has unit variance at every sigma, and loss_weight="edm" weighs its error equally at all.
    """

    network_sees_z = True

    def __init__(self, sigma_data):
        super().__init__()
        self.sigma_data = sigma_data

    def clean(self, y):
        return y

    def forward(self, features, z, sigma, temperature=1.0):
        """features and z (B, ...) of the same shape -> D (B, ...). D is not a distribution: temperature must stay 1."""
        assert features.shape == z.shape and temperature == 1.0
        c_skip, c_out, _, _ = edm_coefficients(broadcast(sigma, z), self.sigma_data)
        return c_skip * z + c_out * features

    def loss(self, features, z, sigma, y):
        """Squared error of D, the mean over everything but the batch. (B,)"""
        return (self(features, z, sigma) - y).square().flatten(1).mean(1)
