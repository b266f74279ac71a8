"""A DiffusionBlock: some layers, trained independently to undo the noise of one interval; and the end-to-end baseline.

A block owns every parameter it trains, from the input embedding to the output head: no trainable tensor is shared, so
a block can be trained anywhere, in any order. Its loss is the whole method.

The network is the script's own, and returns features for a head (heads.py): (B, ..., width), for images those of z:

    network(x, ...)                with a DenoisingHead, and in EndToEnd: it reads only the condition x
    network(x, z, c_noise, ...)    with other heads: it is also shown the noisy target, times c_in, and the noise level
"""

import torch
import torch.nn as nn

from nano_db.heads import broadcast, cross_entropy
from nano_db.schedule import edm_coefficients, edm_weight, sample_sigma


class DiffusionBlock(nn.Module):
    """One denoiser, for the noise levels `span` = (low, high) of the distribution `noise`. network, head: see above.
    loss_weight: "none", or "edm" for w(sigma) of schedule.py. clean_weight: the weight of a second loss (see `loss`).
    """

    def __init__(self, network, head, noise, span, loss_weight="none", clean_weight=0.0):
        super().__init__()
        assert not (head.network_sees_z and clean_weight), "a network that is shown z would have to be evaluated twice"
        assert loss_weight in ("none", "edm"), loss_weight
        self.clean_weight = clean_weight
        self.network, self.head = network, head
        self.noise, self.span, self.loss_weight = noise, span, loss_weight

    def features(self, x, z, sigma, **extra):
        """The network's features, which the head reads: (B, ..., width). sigma (B,); `extra` goes to the network."""
        if not self.head.network_sees_z:
            return self.network(x, **extra)
        _, _, c_in, c_noise = edm_coefficients(sigma, self.head.sigma_data)
        return self.network(x, broadcast(c_in, z) * z, c_noise, **extra)

    def forward(self, x, z, sigma, temperature=1.0, **extra):
        """The head's answer for noisy targets z (B, ..., d) at sigma, (B,) or one number."""
        if not torch.is_tensor(sigma) or not sigma.dim():
            sigma = torch.full((len(z),), float(sigma), dtype=z.dtype, device=z.device)
        return self.head(self.features(x, z, sigma, **extra), z, sigma, temperature)

    def loss(self, x, y):
        """The denoising loss at random levels within the block's span: the mean over samples of w(sigma_i) * loss_i.

        With clean_weight the block is also asked for p(y | x) where z says nothing (ours): at z = 0 there is no
        likelihood term, and the head has only what the trunk found in x. At low noise z gives y away, so
        without this a late block hardly learns to read x. The trunk is evaluated once for both.
        """
        where = "cpu" if y.device.type == "mps" else y.device  # MPS has no float64
        sigma = sample_sigma(self.noise, len(y), *self.span, device=where).float().to(y.device)  # (B,)
        clean = self.head.clean(y)  # (B, ..., d)
        z = clean + broadcast(sigma, clean) * torch.randn_like(clean)
        features = self.features(x, z, sigma)
        per_sample = self.head.loss(features, z, sigma, y)  # (B,)
        weight = edm_weight(sigma, self.head.sigma_data) if self.loss_weight == "edm" else torch.ones_like(sigma)
        assert weight.shape == per_sample.shape == (len(y),)  # (B,) times (B, 1) would broadcast to all pairs
        loss = (weight * per_sample).mean()
        if self.clean_weight:
            highest = torch.full_like(sigma, self.span[1])  # where z says least, as z = 0 does
            loss = loss + self.clean_weight * self.head.loss(features, torch.zeros_like(z), highest, y).mean()
        return loss


class EndToEnd(nn.Module):
    """The baseline for labels and tokens: the same network and output projection, without noise, trained as usual."""

    def __init__(self, network, head):
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x, **extra):
        """Logits of p(y | x), (B, ..., V)."""
        return self.head.output_projection(self.network(x, **extra)).float()

    def loss(self, x, y):
        head, features = self.head, self.network(x)
        return cross_entropy(head.output_projection, y, features, classes=len(head.target_embeddings)).mean()
