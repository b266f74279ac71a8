"""How far generated images are from real ones: a Frechet distance in the features of a small classifier.

FID (Heusel et al. 2017) takes the features of an Inception network trained on ImageNet. This is the same distance in
the features of a small network trained on the spot. Its values can be compared only with each other, on the same data.
"""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from nano_db.trainer.run import seed_from

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


class FrechetSmall:
    """The distance to the training images of `images` (data/images.py), in 64 features: three convolutions that each
    halve the image, then the mean over the remaining positions. They are trained here, for `steps` steps, from a fixed
    seed, so that runs with different seeds are measured in the same way.

    count: how many images will be judged, more than 64. Half of the training images are the reference; `floor` is the
    distance of `count` images from the other half, which must have that many.
    """

    def __init__(self, images, count, steps, device="cpu"):
        self.device, self.count, layers = device, count, []
        seed_from(0)
        for a, b in pairwise((images.shape[0], 32, 64, FEATURES)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers).to(device)
        projection = nn.Linear(FEATURES, len(images.classes)).to(device)
        optimizer = torch.optim.AdamW([*self.convolutions.parameters(), *projection.parameters()], lr=2e-3)
        for _ in range(steps):
            x, labels = images.batch(128, device=device)
            F.cross_entropy(projection(self.convolutions(x).mean((2, 3))), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        self.reference = self._features(images.training(order[:half][:10_000]))
        self.floor = frechet_distance(self._features(images.training(order[half : half + count])), self.reference)

    @torch.no_grad()
    def _features(self, images):
        """(B, C, H, W) in [-1, 1] -> (B, 64)"""
        return torch.cat([self.convolutions(part.to(self.device)).mean((2, 3)).cpu() for part in images.split(500)])

    def __call__(self, generated):
        """generated: (count, C, H, W) in [-1, 1]."""
        assert len(generated) == self.count
        return frechet_distance(self._features(generated), self.reference)
