"""Images behind one small interface: `load_images(name)` gives pictures with labels to train on, and others to test on.

Pixels are stored as bytes, and given to networks as floats in [-1, 1].
"""

import hashlib
from dataclasses import dataclass

import torch

from data import cifar, glyphs
from data.augment import augment
from nano_db.errors import UsageError

NAMES = ("glyphs", "cifar10", "cifar100")


def to_floats(images):
    """Bytes 0..255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass
class Images:
    """train, test: (N, channels, height, width) uint8, with labels (N,) int64, whose names are `classes`.

    mirrors: may an image be mirrored, or cropped at its edge, without becoming something else? sha256: of all pixels
    and labels.
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]
    mirrors: bool
    sha256: str

    def __post_init__(self):
        for labels in (self.train_labels, self.test_labels):
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise UsageError(f"labels must lie between 0 and {len(self.classes) - 1}, the number of the last class")

    @property
    def shape(self):
        """(channels, height, width)"""
        return tuple(self.train.shape[1:])

    def training(self, rows):
        """Training images of these row numbers, as floats."""
        return to_floats(self.train[rows])

    def batch(self, batch_size, augmentation="none", device="cpu"):
        """Random training images as floats (B, C, H, W) and labels (B,), by torch's global generator."""
        chosen = torch.randint(len(self.train), (batch_size,))
        images = augment(self.train[chosen], augmentation, self.mirrors)
        return to_floats(images).to(device), self.train_labels[chosen].to(device)

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
    arrays = (*train, *test)
    sha256 = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    return Images(*map(torch.from_numpy, arrays), classes, mirrors=name != "glyphs", sha256=sha256)
