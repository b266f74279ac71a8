"""How far generated images are from real ones: a Frechet distance in the features of a small classifier.

FID (Heusel et al. 2017) takes the features of an Inception network trained on ImageNet. This is the same distance in
the features of a small network, trained in place on the same data. Its values are no FIDs and compare only with each
other, on the same data set; each is therefore printed beside the distance of real images from real images.
"""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.errors import UsageError
from nano_db.trainer import seed_from

FEATURES = 64


def frechet_distance(a, b):
    """Distance of the normal distributions fitted to features a (n, d) and b (m, d): |mean difference|^2 plus
    Tr(A + B - 2 (A B)^1/2), A and B being the covariances.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^1/2; Tr (A B)^1/2 = Tr (A^1/2 B A^1/2)^1/2
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


class SmallClassifier(nn.Module):
    """Three convolutions that halve the image each, then the mean over what is left of it: 64 features."""

    def __init__(self, channels, classes):
        super().__init__()
        widths = (channels, 32, 64, FEATURES)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.readout = nn.Linear(FEATURES, classes)

    def features(self, x):
        """x (B, C, H, W) in [-1, 1] -> (B, 64)"""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return x.mean((2, 3))


class FrechetSmall:
    """The distance to the training images of `images` (data/images.py). The classifier is trained at
    once, for `steps` steps, from a seed of its own, so that runs with different seeds are measured alike.

    count: how many images will be judged. Half of the training images are the reference; `floor` is the distance of
    `count` images of the other half. Raises UsageError where `count` is too small for a covariance of 64 features.
    """

    def __init__(self, images, count, steps, device="cpu"):
        check_count(count, len(images.train))
        self.device, self.count = device, count
        seed_from(0)
        self.network = SmallClassifier(images.shape[0], len(images.classes)).to(device).train()
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3)
        for _ in range(steps):
            x, labels = images.batch(128, device=device)
            F.cross_entropy(self.network.readout(self.network.features(x)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.network.eval()
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        self.reference = self._features(images.training(order[:half][:10_000]))
        self.floor = frechet_distance(self._features(images.training(order[half : half + count])), self.reference)

    @torch.no_grad()
    def _features(self, images):
        return torch.cat([self.network.features(part.to(self.device)).cpu() for part in images.split(500)])

    def __call__(self, generated):
        """generated: (count, C, H, W) in [-1, 1]."""
        assert len(generated) == self.count
        return frechet_distance(self._features(generated), self.reference)


def check_count(count, available):
    if not FEATURES < count <= available // 2:
        raise UsageError(
            f"--frechet-images {count}: the distance needs more than {FEATURES} images, and at most half of the "
            f"{available} training images"
        )
