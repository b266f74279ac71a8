"""Your own pictures: a folder with one subfolder per class (the convention of torchvision's ImageFolder).

    FOLDER/cat/1.png, FOLDER/cat/2.jpg, FOLDER/dog/...              a tenth of each class is held out
    FOLDER/train/cat/..., FOLDER/test/cat/..., FOLDER/train/dog/... or a folder of their own for held-out pictures

PNG or JPEG, of any size: the short side is resized to `size` pixels, and the middle is cut out. Images have one
channel if all pictures are grey, otherwise three. Transparent areas become white.
"""

import hashlib
import os
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nano_db.errors import UsageError, is_out_of_memory

SUFFIXES = (".png", ".jpg", ".jpeg")
HELD_OUT = 10  # one picture in this many
REPORT_EVERY = 5  # seconds
ORIENTATION = 0x0112  # the EXIF tag; below, by its value, the operation that turns a picture upright
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
UPRIGHT = {value: Image.Transpose[name] for value, name in enumerate(TURNS, start=2)}
LARGE = 100 * 2**20  # bytes; above this, the memory needed is printed before it is allocated


def load(folder, size):
    """((images, labels) to train on, the same held out, class names); images (N, 1 or 3, size, size) uint8.

    Raises UsageError for a folder that is not laid out like this, a class with too few pictures, or a file that cannot
    be read.
    """
    folder = Path(folder)
    try:
        sides = {path.name.lower(): path for path in folders_in(folder)}
        if sorted(sides) == ["test", "train"]:
            train, test = classes_of(sides["train"]), classes_of(sides["test"])
        elif "train" in sides or "test" in sides:
            found = f"{folder} holds the folders {', '.join(path.name for path in sides.values())}"
            advice = "a split needs exactly the folders train and test; if one of them is a class, rename it"
            raise UsageError(f"{found}: {advice}")
        else:
            train, test = held_out(classes_of(folder), folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror})") from error
    if unknown := [name for name in test if name not in train]:
        raise UsageError(f"{folder}: the class {unknown[0]} has pictures to test on but none to train on")
    if untested := [name for name in train if name not in test]:
        print(f"classes without pictures to test on: {', '.join(untested)}")
    classes = list(train)
    number = {name: label for label, name in enumerate(classes)}
    labelled = [(path, number[name]) for name, paths in train.items() for path in paths]
    cut = len(labelled)
    # Two of each class in turn: so the first pictures (--test-images) are of all classes, and each class is in both
    # halves, which take every other picture.
    in_turn = sorted((i // 2, number[name], i, path) for name, paths in test.items() for i, path in enumerate(paths))
    labelled += [(path, label) for _, label, _, path in in_turn]
    if len(in_turn) < 2:
        advice = f"a single class needs {2 * HELD_OUT} pictures, or two in a folder `test` beside `train`"
        raise UsageError(f"{folder}: one held-out picture is too few, because half are for validation: {advice}")
    print(f"{folder}: {cut:,} pictures to train on, {len(in_turn):,} held out, {len(classes)} classes")
    images, labels = read_all([path for path, _ in labelled], size), np.array([n for _, n in labelled], np.int64)
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), classes


def folders_in(folder):
    """Subfolders sorted by name (Path's own order differs on Windows), without those that operating systems create."""
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "__MACOSX"]
    return sorted(folders, key=lambda path: path.name)


def files_in(folder):
    """All files in a folder and its subfolders, except hidden ones and special files (reading a pipe would block)."""
    for inside, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (path for name in names if name[0] != "." and (path := Path(inside, name)).is_file())


def refuse(error):
    raise error


def classes_of(folder):
    """{class name: paths of its pictures, by name}, of a folder with a subfolder for each class."""
    found = {}
    others = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    for path in folders_in(folder):
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in path.name):
            raise UsageError(f"{folder}: the name {path.name!r} contains unprintable characters: rename that folder")
        files = sorted(files_in(path), key=lambda file: file.as_posix())
        found[path.name] = [file for file in files if file.suffix.lower() in SUFFIXES]
        others += [file for file in files if file.suffix.lower() not in SUFFIXES]
    if not found:
        raise UsageError(f"{folder} holds no folders: put the pictures of each class into a folder with its name")
    if empty := [name for name, paths in found.items() if not paths]:
        count = sum(1 for path in others if path.is_relative_to(folder / empty[0]))
        advice = f"convert the {count} other files" if count else "a class needs pictures"
        raise UsageError(f"{folder / empty[0]} holds no PNG or JPEG: {advice}")
    if others:
        print(f"files skipped, not a PNG or JPEG in a class folder: {len(others)}, such as {others[0]}")
    return found


def held_out(classes, folder):
    """Split {class: paths} in two: a tenth of each class, but at least one picture, is held out. The choice depends
    only on names, so it is the same on every machine.
    """
    train, test = {}, {}
    for name, paths in classes.items():
        if len(paths) < 2:
            raise UsageError(f"{paths[0]} is the only picture of its class: add one more, which will be held out")
        chosen = set(sorted(paths, key=lambda path: digest(path.relative_to(folder)))[: max(1, len(paths) // HELD_OUT)])
        test[name] = [path for path in paths if path in chosen]
        train[name] = [path for path in paths if path not in chosen]
    return train, test


def digest(path):
    return hashlib.sha256(os.fsencode(path.as_posix())).digest()


def read_all(paths, size):
    """All pictures as one array (N, 1 or 3, size, size) of bytes. Prints its progress now and then."""
    try:
        images = np.empty((len(paths), 3, size, size), np.uint8)
    except MemoryError as error:
        needed = f"{len(paths):,} pictures of {size} x {size} pixels take {3 * len(paths) * size**2 / 2**30:,.1f} GiB"
        raise UsageError(f"out of memory: {needed}; choose a smaller --image-size") from error
    if images.nbytes > LARGE:
        print(f"reading {len(paths):,} pictures of {size} x {size} pixels: at most {images.nbytes / 2**20:,.0f} MiB")
    begun = reported = time.monotonic()
    coloured = False
    for i, path in enumerate(paths):
        pixels = read(path, size)  # (size, size) or (size, size, 3)
        coloured |= pixels.ndim == 3
        images[i] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            left = (reported - begun) / (i + 1) * (len(paths) - i - 1)
            print(f"read {i + 1:,} of {len(paths):,} pictures, {left:.0f} s left", flush=True)
    return images if coloured else np.ascontiguousarray(images[:, :1])


def read(path, size):
    """A picture as bytes: (size, size) if all of its pixels are grey, else (size, size, 3)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # of 89 million pixels and more
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                image.draft(None, (2 * size, 2 * size))  # a large JPEG need not be decoded in full
                turned = UPRIGHT.get(image.getexif().get(ORIENTATION))
                upright = to_rgb(image) if turned is None else to_rgb(image).transpose(turned)
                pixels = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
        grey = (pixels == pixels[..., :1]).all()
        return pixels[..., 0] if grey else pixels
    except Exception as error:  # damaged bytes raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        name = str(path) if str(path).isprintable() else repr(str(path))
        raise UsageError(f"{name} cannot be read as PNG or JPEG ({reason}): repair or remove it") from error


def to_rgb(image):
    """A picture in mode "RGB", whatever it was; white where it is transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, of which 8 bits are kept
        deep = np.array(image, np.float32)
        deep[deep == image.info.get("transparency")] = 2**16 - 1
        return Image.fromarray((deep / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
