"""Images behind one small interface: `load_images(name)` gives pictures with labels to train on, and others to test on.

Pixels are stored as bytes, and given to networks as floats in [-1, 1].
"""

import hashlib
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import cifar, glyphs, image_folder, mnist
from nano_db.errors import UsageError

PADDING = 4  # pixels
EDM = (-1.2, 0.5)  # p_mean and sigma_data (Karras et al. 2022), for photographs
# Glyphs are black or white, so that they can be told apart under far more noise than photographs.
NOISE_LEVELS = {"glyphs": (0.5, 0.9), **dict.fromkeys(cifar.ARCHIVES, EDM)}
NAMES = ("glyphs", *cifar.ARCHIVES, *mnist.SOURCES)
MIRRORED = (*cifar.ARCHIVES, "fashion-mnist")  # your own may be letters, which must not be mirrored


def to_floats(images):
    """Bytes 0..255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass
class Images:
    """train, test: (N, channels, height, width) uint8, with labels (N,) int64, whose names are `classes`.

    mirrors: may an image be mirrored without becoming something else? (It can always be shifted.) sha256: of
    all pixels and labels. p_mean, sigma_data: EDM's constants for a network that generates such images; why: where
    these come from. missing: why there is nothing to train or score on, if a run is to sample without its images.
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]
    mirrors: bool
    sha256: str
    p_mean: float = EDM[0]
    sigma_data: float = EDM[1]
    why: str = "EDM's, for photographs"
    missing: str = ""

    def keeps(self):
        """What a run has to keep in order to sample without these images."""
        constants = {"p_mean": self.p_mean, "sigma_data": self.sigma_data}
        return {"classes": self.classes, "shape": list(self.shape), **constants}

    @property
    def shape(self):
        """(channels, height, width)"""
        return tuple(self.train.shape[1:])

    def training(self, rows):
        """Training images of these row numbers, as floats."""
        return to_floats(self.train[rows.to(self.train.device)])

    def batch(self, batch_size, augmentation="none", device="cpu"):
        """Random training images as floats (B, C, H, W) and labels (B,), from torch's global generator. augmentation:
        "none"; "flip" mirrors each with probability 1/2, if `mirrors`; "standard" also shifts by up to PADDING pixels.
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


def load_images(name="glyphs", folder="data/cache", count=18_000, size=32, kept=None):
    """Images. name: one of NAMES, or the path of a folder of pictures (image_folder.py). count: how many glyphs to draw
    for training; a fifth as many are drawn for testing. size: side of the folder's pictures, in pixels.

    kept: what a run that is only to be used has kept of its data (trainer/checkpoints.kept). If its images are not on
    this machine, the Images can neither train nor score, and say why (`missing`).
    """
    kept = kept or {}
    try:
        train, test, classes = read_images(name, folder, count, size)
        checksum = hashlib.sha256()
        for array in (*train, *test):
            checksum.update(np.ascontiguousarray(array))
        sha256 = checksum.hexdigest()
        if kept.get("sha256", sha256) != sha256:
            raise UsageError(f"--data {name}: not the images that the run was trained on (or they have changed)")
    except UsageError as error:
        if not kept.keys() >= {"sha256", "classes", "shape", "p_mean", "sigma_data"}:
            raise
        nothing, labels = torch.empty(0, *kept["shape"], dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        about = {name: kept[name] for name in ("classes", "sha256", "p_mean", "sigma_data")}
        return Images(nothing, labels, nothing, labels, mirrors=False, why="the run's", missing=str(error), **about)
    constants = edm_constants(name, train[0])
    return Images(*map(torch.from_numpy, (*train, *test)), classes, name in MIRRORED, sha256, *constants)


def edm_constants(name, images):
    """(p_mean, sigma_data, why) for a network that generates these images. For data without known constants,
    sigma_data is measured, and EDM's p_mean shifts with it: what counts is the noise relative to the pixels.
    """
    if name in NOISE_LEVELS:
        return *NOISE_LEVELS[name], f"known for {name}"
    values, counts = to_floats(torch.arange(256)).double().numpy(), np.zeros(256)
    for image in images:  # all at once would take eight times their memory
        counts += np.bincount(image.ravel(), minlength=256)
    mean = np.average(values, weights=counts)
    std = max(0.01, float(np.average((values - mean) ** 2, weights=counts)) ** 0.5)  # 0 if all pixels are one grey
    return round(EDM[0] + math.log(std / EDM[1]), 5), round(std, 5), "measured on the training pixels"


def read_images(name, folder, count, size):
    """((images, labels) to train on, the same to test on, class names), as arrays."""
    if name == "glyphs":
        train, test = glyphs.make(glyphs.TRAIN_FONTS, count, seed=0), glyphs.make(glyphs.TEST_FONTS, count // 5, seed=1)
        return train, test, list(glyphs.CLASSES)
    for module, names in ((cifar, cifar.ARCHIVES), (mnist, mnist.SOURCES)):
        if name in names:
            return module.load(name, folder)
    if not os.path.isdir(name):  # Path would raise for a name that is too long
        raise UsageError(f"--data {name} is not a folder: choose {', '.join(NAMES)}, or the path of one with pictures")
    return image_folder.load(name, size)
