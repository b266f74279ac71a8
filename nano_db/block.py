"""A DiffusionBlock: some layers, trained alone to undo noise of one interval of levels; and the end-to-end baseline.

Both are modules with `.loss(batch, rows)`; the trainer (trainer.py) knows no more of them. rows, a slice, are the
samples to compute, where several processes share a batch (workers.py); noise is drawn for all samples whatever the
rows, so that each meets the same noise as in a single process. A block owns every parameter it trains, from the input
embedding to the output head: no trainable tensor is shared, so a block can be trained anywhere, in any order.

The network is the script's own: network(x, z, c_noise, ...) -> features (B, ..., width). z comes scaled by c_in; both
z and c_noise are None where the network is not shown the noisy target.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.codebook import broadcast
from nano_db.schedule import edm_coefficients, edm_weight, sample_sigma


class DiffusionBlock(nn.Module):
    """One denoiser, for the noise levels `span` = (low, high) of the distribution `noise`.

    network, head: see above and codebook.py. loss_weight: "none" or "edm" (w(sigma) of schedule.py).
    shows_z: whether the network sees z and sigma. If not, they enter by the posterior head alone. drop: a function that
    replaces some of the conditions x (B, ...) in training by one that says nothing, for guidance (image_stack.py).
    """

    def __init__(self, network, head, noise, span, sigma_data=0.5, loss_weight="none", shows_z=True, drop=None):
        super().__init__()
        self.drop = drop
        self.network, self.head = network, head
        self.noise, self.span, self.sigma_data = noise, span, sigma_data
        self.loss_weight, self.shows_z = loss_weight, shows_z

    def forward(self, x, z, sigma, temperature=1.0, **extra):
        """The head's answer for noisy targets z (B, ..., d) at sigma, (B,) or a float. `extra` goes to the network."""
        if not self.shows_z:
            return self.head(self.network(x, None, None, **extra), z, sigma, temperature)
        sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device).expand(len(z))
        _, _, c_in, c_noise = edm_coefficients(sigma, self.sigma_data)
        return self.head(self.network(x, broadcast(c_in, z) * z, c_noise, **extra), z, sigma, temperature)

    def log_prior(self, x, **extra):
        """ln p(y | x), without any z: what a block says whose network is not shown z. (B, ..., V)"""
        assert not self.shows_z, "a network that is shown z has no word on p(y | x) alone"
        return self.head.log_prior(self.network(x, None, None, **extra))

    def loss(self, batch, rows=slice(None)):
        """Denoising at random levels of the block's own span: the mean over samples of w(sigma_i) * loss_i."""
        x, y = batch
        sigma = sample_sigma(self.noise, len(y), *self.span).float().to(y.device)  # (B,)
        clean = self.head.clean(y)  # (B, ..., d)
        z = clean + broadcast(sigma, clean) * torch.randn_like(clean)
        x = self.drop(x) if self.drop else x
        x = None if x is None else x[rows]
        y, z, sigma = y[rows], z[rows], sigma[rows]
        per_sample = self.head.loss(self(x, z, sigma), y)  # (B,)
        weight = edm_weight(sigma, self.sigma_data) if self.loss_weight == "edm" else torch.ones_like(sigma)
        assert weight.shape == per_sample.shape == (len(y),)  # (B,) times (B, 1) would make every pair's product
        return (weight * per_sample).mean()


class EndToEnd(nn.Module):
    """The baseline for discrete targets: the same network and readout, without noise, trained as usual."""

    def __init__(self, network, head):
        super().__init__()
        self.network, self.head = network, head

    def log_prior(self, x, **extra):
        """ln p(y | x) (B, ..., V)."""
        return self.head.log_prior(self.network(x, None, None, **extra))

    def loss(self, batch, rows=slice(None)):
        x, y = (part[rows] for part in batch)
        logits = self.head.readout(self.network(x, None, None)).float()
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())
