"""MNIST (LeCun, Cortes, Burges 1998) and Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): ten classes, 28 x 28 grey pixels.

The files are in the idx format: two zero bytes, the type of the numbers (8: bytes), the number of axes, the length of
each axis as four bytes, big-endian; then the numbers. Two black pixels are added on each side: 32 x 32 pixels can be
cut into patches of 2, 4 or 8 pixels per side.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.download import fetch

MARGIN = 2  # pixels
FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
         "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")  # fmt: skip


@dataclass(frozen=True)
class Source:
    url: str
    files: dict[str, tuple[str, int]]  # md5 and bytes of each of FILES
    classes: tuple[str, ...]


SOURCES = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        dict(zip(FILES, (
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422), ("d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            ("9fb629c4189551a2d022fa330f9573f3", 1_648_877), ("ec29112dd5afa0611ce80d1b7f02629c", 4542),
        ), strict=True)),
        tuple("0123456789"),
    ),
    "fashion-mnist": Source(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        dict(zip(FILES, (
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880), ("25c81989df183df01b3e8a0aad5dffbe", 29_515),
            ("bef4ecab320f06d8554ea6380940ec79", 4_422_102), ("bb300cfdad3c16e7a12a480ee83cd310", 5148),
        ), strict=True)),
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}  # fmt: skip


def load(name, folder):
    """((images, labels) to train on, the same to test on, class names); images (N, 1, 32, 32) uint8, labels (N,).

    Read from the official files in `folder`/<name>/, which are downloaded if they are not there.
    """
    about, arrays = SOURCES[name], []
    for file, (md5, size) in about.files.items():
        path = fetch(about.url + file, Path(folder) / name / file, md5, size, algorithm="md5")
        arrays.append(parse_idx(gzip.decompress(path.read_bytes())))
    (train, train_labels, test, test_labels), pad = arrays, ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))
    train, test = (np.pad(images[:, None], pad) for images in (train, test))
    return (train, train_labels.astype(np.int64)), (test, test_labels.astype(np.int64)), list(about.classes)


def parse_idx(content):
    """The array in an idx file of bytes. Raises ValueError for anything else."""
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    if not axes or len(content) < 4 + 4 * axes:
        raise ValueError("not an idx file of bytes")
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(*map(int, shape))
