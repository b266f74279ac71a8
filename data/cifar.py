"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the official binary archives: photographs of 32 x 32 pixels.

An archive holds files of equal records: label bytes (one; for CIFAR-100 two, coarse then fine), then 3,072 bytes of
pixels, a plane each of red, green and blue. Nothing is unpickled, and nothing is unpacked to the disk: the wanted
members are read by their names, so that what else an archive may hold does not matter.
"""

import gzip
import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.download import fetch
from nano_db.errors import UsageError

PIXELS = (3, 32, 32)
MOST_BYTES = 200_000_000  # of an archive, unpacked; the official ones have about 185,000,000


@dataclass(frozen=True)
class Archive:
    url: str
    md5: str
    size: int  # bytes
    folder: str  # inside the archive
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str  # the file of class names, a line each
    classes: int
    label_bytes: int  # a record; the last one is the label


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        170_052_171,
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
        10,
        1,
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        168_513_733,
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        100,
        2,
    ),
}


def load(name, folder):
    """((images, labels) to train on, the same to test on, class names); images (N, 3, 32, 32) uint8, labels (N,).

    Read from `folder`/cifar-10-batches-bin (unpacked, as it is) or else from the official archive in `folder`, which
    is downloaded if it is not there and must have its md5 checksum; cifar100 likewise.
    """
    about = ARCHIVES[name]
    unpacked = Path(folder) / about.folder
    if unpacked.is_dir():
        return _assemble(about, unpacked, lambda member: _read_file(unpacked / member))
    path = Path(folder) / about.url.rsplit("/", 1)[1]
    return read_archive(about, fetch(about.url, path, about.md5, about.size, algorithm="md5"))


def read_archive(about, path):
    """The same from an archive of the official layout, whatever its checksum."""
    try:
        with gzip.open(path) as stream:
            content = stream.read(MOST_BYTES + 1)  # to the end, where gzip's own checksum stands
        if len(content) > MOST_BYTES:
            raise UsageError(f"{path} unpacks to more than {MOST_BYTES} bytes: it is not the official archive")
        with tarfile.open(path, fileobj=io.BytesIO(content)) as archive:
            return _assemble(about, path, lambda member: _read_member(archive, f"{about.folder}/{member}"))
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UsageError(f"{path} is no whole tar.gz archive ({error}): delete it to download it again") from error


def _read_file(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): unpack the archive again") from error


def _read_member(archive, name):
    try:
        member = archive.getmember(name)
    except KeyError:
        raise UsageError(f"{archive.name} has no member {name}: it is not the official archive") from None
    if not member.isreg():  # a link could point anywhere
        raise UsageError(f"{archive.name}: member {name} is no file: it is not the official archive")
    return archive.extractfile(member).read()


def _assemble(about, source, read):
    """read(name): the bytes of a file of the archive."""
    lines = read(about.names).decode("utf-8", "replace").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != about.classes:
        raise UsageError(f"{source}: {about.names} names {len(names)} classes, not {about.classes}")
    train, test = (
        tuple(map(np.concatenate, zip(*(_records(about, source, member, read) for member in members), strict=True)))
        for members in (about.train, about.test)
    )
    return train, test, names


def _records(about, source, member, read):
    content, size = np.frombuffer(read(member), np.uint8), about.label_bytes + int(np.prod(PIXELS))
    if not len(content) or len(content) % size:
        raise UsageError(
            f"{source}: {member} has {len(content)} bytes, no multiple of {size}: it is cut off or damaged"
        )
    records = content.reshape(-1, size)
    labels = records[:, about.label_bytes - 1].astype(np.int64)
    if labels.max() >= about.classes:
        raise UsageError(
            f"{source}: {member} has the label {labels.max()}, but labels go up to {about.classes - 1}: it is damaged"
        )
    return records[:, about.label_bytes :].reshape(-1, *PIXELS), labels
