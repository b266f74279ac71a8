"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the official archives: photographs of 32 x 32 pixels.

A binary archive holds files of records of equal length: label bytes (one; for CIFAR-100 two, coarse then fine), then
3,072 bytes of pixels, one plane each for red, green and blue. The archive for Python, which torchvision uses, holds the
same arrays in pickles. Nothing is unpickled (pickles are read as lists of opcodes), and nothing is unpacked to disk.
"""

import hashlib
import pickletools
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
    names: str  # the file of class names, one per line
    label_bytes: int  # per record; the last one is the label
    # In the archive for Python: its folder; files with their md5, training files first; keys of labels and names.
    python_folder: str
    python_files: dict[str, str]
    keys: tuple[str, str]


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171,
        "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",),
        "batches.meta.txt", 1, "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        ("labels", "label_names"),
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733,
        "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2,
        "cifar-100-python",
        {
            "train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        ("fine_labels", "fine_label_names"),
    ),
}  # fmt: skip


def is_here(name, folder="data/cache"):
    """Whether `load` finds the images in `folder`, and need not download them."""
    about = ARCHIVES[name]
    places = (Path(folder) / about.folder, Path(folder) / about.python_folder, _archive(about, folder))
    return any(place.exists() for place in places)


def load(name, folder):
    """((images, labels) to train on, the same to test on, class names); images (N, 3, 32, 32) uint8, labels (N,).

    Read from `folder`/cifar-10-batches-bin (unpacked; not checked), or from `folder`/cifar-10-batches-py (as
    torchvision unpacks it), or else from the official archive in `folder`, which is downloaded if it is not there. The
    md5 checksums of the latter two must match. cifar100 works the same way.
    """
    about = ARCHIVES[name]
    unpacked = Path(folder) / about.folder
    if unpacked.is_dir():
        return _assemble(about, unpacked, lambda member: (unpacked / member).read_bytes())
    if (pickled := Path(folder) / about.python_folder).is_dir():
        return _assemble_pickled(about, pickled)
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
                raise ValueError(f"found label {labels.max()}, but only {len(names)} classes")
            parts.append((records[:, about.label_bytes :].reshape(-1, *PIXELS), labels))
        return *parts, names
    except (OSError, ValueError) as error:  # from a folder: an archive has passed its checksum
        raise UsageError(f"{source} is damaged or incomplete ({error}): unpack the archive again") from error


def _assemble_pickled(about, folder):
    *batches, names = [_opcodes(folder / name, md5) for name, md5 in about.python_files.items()]
    parts = []
    for members in (batches[:-1], batches[-1:]):
        images = np.concatenate([_pixels(opcodes) for opcodes in members])
        labels = [label for opcodes in members for label in _list_after(opcodes, about.keys[0])]
        parts.append((images, np.array(labels, np.int64)))
    return *parts, _list_after(names, about.keys[1])


def _opcodes(path, md5):
    """[(name, argument)] of a pickle's opcodes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): unpack the archive again") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UsageError(f"{path} is not the official file (its md5 is not {md5[:16]}...): unpack the archive again")
    return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(content)]


def _list_after(opcodes, key):
    """The numbers or strings in the list that follows a key. It comes in parts, each from MARK to APPENDS."""
    values, previous = [], ""
    for name, argument in opcodes[[argument for _, argument in opcodes].index(key) + 1 :]:
        if name in ("SHORT_BINSTRING", "BININT1"):
            if previous == "APPENDS":  # the next key
                break
            values.append(argument)
        if "PUT" not in name:
            previous = name
    return values


def _pixels(opcodes):
    """The array (N, 3, 32, 32): by far the longest string. The boolean before it tells whether it is column-major."""
    at = max(range(len(opcodes)), key=lambda i: len(opcodes[i][1]) if isinstance(opcodes[i][1], str) else 0)
    columns_first = next(name for name, _ in reversed(opcodes[:at]) if name in ("NEWTRUE", "NEWFALSE")) == "NEWTRUE"
    pixels = np.frombuffer(bytearray(opcodes[at][1], "latin-1"), np.uint8)
    rows = len(pixels) // int(np.prod(PIXELS))
    pixels = pixels.reshape(-1, rows).T if columns_first else pixels
    return np.ascontiguousarray(pixels).reshape(rows, *PIXELS)
