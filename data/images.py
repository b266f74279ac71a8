"""Images behind one small interface: `load_images(name)` gives pictures with labels to train on, and others to test on.

Pixels are stored as bytes, and given to networks as floats in [-1, 1].
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import cifar, glyphs

PADDING = 4  # pixels
NAMES = ("glyphs", "cifar10", "cifar100")


def to_floats(images):
    """Bytes 0..255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass
class Images:
    """train, test: (N, channels, height, width) uint8, with labels (N,) int64, whose names are `classes`.

    mirrors: may an image be mirrored without becoming something else? (Shifted it may be: a letter stays that letter.)
    sha256: of all pixels and labels.
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]
    mirrors: bool
    sha256: str

    @property
    def shape(self):
        """(channels, height, width)"""
        return tuple(self.train.shape[1:])

    def training(self, rows):
        """Training images of these row numbers, as floats."""
        return to_floats(self.train[rows.to(self.train.device)])

    def batch(self, batch_size, augmentation="none", device="cpu"):
        """Random training images as floats (B, C, H, W) and labels (B,), by torch's global generator. augmentation:
        "none"; "flip" mirrors every other one, where `mirrors`; "standard" also shifts it by up to PADDING pixels.
        """
        self.train, self.train_labels = self.train.to(device), self.train_labels.to(device)  # once
        chosen = torch.randint(len(self.train), (batch_size,), device=device)
        images, (H, W) = self.train[chosen], self.train.shape[2:]
        if augmentation != "none" and self.mirrors:
            mirrored = torch.rand(batch_size, device=device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if augmentation == "standard":  # zeros (black) come in
            shifts = F.pad(images, (PADDING,) * 4).unfold(2, H, 1).unfold(3, W, 1)
            down, right = torch.randint(2 * PADDING + 1, (2, batch_size), device=device)
            images = shifts[torch.arange(batch_size, device=device), :, down, right]  # of (B, C, 9, 9, H, W)
        return to_floats(images), self.train_labels[chosen]

    def test_batches(self, batch_size, count=0, device="cpu"):
        """The first `count` test images (0: all) in order, as floats, with their labels."""
        count = min(count or len(self.test), len(self.test))
        for i in range(0, count, batch_size):
            rows = slice(i, min(i + batch_size, count))
            yield to_floats(self.test[rows]).to(device), self.test_labels[rows].to(device)


def load_images(name="glyphs", folder="data/cache", count=18_000):
    """Images. name: one of NAMES. count: how many glyphs to draw to train on; a fifth as many more to test on."""
    if name == "glyphs":
        train, test = glyphs.make(glyphs.TRAIN_FONTS, count, seed=0), glyphs.make(glyphs.TEST_FONTS, count // 5, seed=1)
        classes = list(glyphs.CLASSES)
    else:
        train, test, classes = cifar.load(name, folder)
    sha256 = hashlib.sha256(b"".join(array.tobytes() for array in (*train, *test))).hexdigest()
    return Images(*map(torch.from_numpy, (*train, *test)), classes, mirrors=name != "glyphs", sha256=sha256)
