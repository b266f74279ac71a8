"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the official binary archives: photographs of 32 x 32 pixels.

An archive holds files of equal records: label bytes (one; for CIFAR-100 two, coarse then fine), then 3,072 bytes of
pixels, a plane each of red, green and blue. Nothing is unpickled, and nothing is unpacked to the disk.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.download import fetch
from nano_db.errors import UsageError

PIXELS = (3, 32, 32)


@dataclass(frozen=True)
class Archive:
    url: str
    md5: str
    size: int  # bytes
    folder: str  # inside the archive
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str  # the file of class names, a line each
    label_bytes: int  # a record; the last one is the label


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171,
        "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",),
        "batches.meta.txt", label_bytes=1,
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733,
        "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", label_bytes=2,
    ),
}  # fmt: skip


def is_here(name, folder="data/cache"):
    """Whether `load` finds the images in `folder`, and need not download them."""
    about = ARCHIVES[name]
    return (Path(folder) / about.folder).is_dir() or _archive(about, folder).exists()


def load(name, folder):
    """((images, labels) to train on, the same to test on, class names); images (N, 3, 32, 32) uint8, labels (N,).

    Read from `folder`/cifar-10-batches-bin (unpacked, as it is) or else from the official archive in `folder`, which
    is downloaded if it is not there and must have its md5 checksum; cifar100 likewise.
    """
    about = ARCHIVES[name]
    unpacked = Path(folder) / about.folder
    if unpacked.is_dir():
        return _assemble(about, unpacked, lambda member: (unpacked / member).read_bytes())
    path = _archive(about, folder)
    with tarfile.open(fetch(about.url, path, about.md5, about.size, algorithm="md5")) as archive:
        return _assemble(about, path, lambda member: archive.extractfile(f"{about.folder}/{member}").read())


def _archive(about, folder):
    return Path(folder) / about.url.rsplit("/", 1)[1]


def _assemble(about, source, read):
    """read(name): the bytes of a file."""
    try:
        names = read(about.names).decode().split()
        parts = []
        for members in (about.train, about.test):
            records = np.frombuffer(bytearray().join(map(read, members)), np.uint8)
            records = records.reshape(-1, about.label_bytes + int(np.prod(PIXELS)))
            labels = records[:, about.label_bytes - 1].astype(np.int64)
            if labels.max() >= len(names):
                raise ValueError(f"the label {labels.max()}, but {len(names)} classes")
            parts.append((records[:, about.label_bytes :].reshape(-1, *PIXELS), labels))
        return *parts, names
    except (OSError, ValueError) as error:  # from a folder: an archive has passed its checksum
        raise UsageError(f"{source} is damaged or incomplete ({error}): unpack the archive again") from error
