import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import cifar, glyphs
from data.images import Images, load_images, to_floats
from nano_db.errors import UsageError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

MAKE_CIFAR = Path(__file__).parents[2] / "shared" / "data" / "make_cifar10.py"


def records(count, seed, classes=10, label_bytes=1):
    random = np.random.default_rng(seed)
    labels, pixels = random.integers(classes, size=(count, label_bytes)), random.integers(256, size=(count, 3072))
    return np.concatenate([labels, pixels], axis=1).astype(np.uint8)


def members(count=6):
    """The files of a small CIFAR-10 of the official layout."""
    files = {f"data_batch_{i}.bin": records(count, i).tobytes() for i in range(1, 6)}
    return files | {
        "test_batch.bin": records(count, 9).tobytes(),
        "batches.meta.txt": "\n".join([*NAMES, "", ""]).encode(),
    }


def write_folder(folder, files):
    inside = folder / "cifar-10-batches-bin"
    inside.mkdir(parents=True)
    for name, content in files.items():
        (inside / name).write_bytes(content)


def write_archive(path, files, prefix="cifar-10-batches-bin/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_glyphs_are_deterministic_and_every_class_is_drawn_equally_often():
    images, labels = glyphs.make(glyphs.TRAIN_FONTS, 360, seed=3)
    glyphs.make.cache_clear()  # else it would be the same array
    again, _ = glyphs.make(glyphs.TRAIN_FONTS, 360, seed=3)
    other, _ = glyphs.make(glyphs.TRAIN_FONTS, 360, seed=4)
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert images.shape == (360, 1, 32, 32) and images.dtype == np.uint8
    assert (np.bincount(labels) == 10).all() and len(np.bincount(labels)) == 36
    assert (images.reshape(360, -1).max(1) > 200).all(), "a glyph is white on black"
    assert images[:, :, [0, -1]].mean() < 2, "and lies inside its picture"


def test_train_and_test_fonts_are_different_ones_and_have_all_characters():
    import matplotlib
    from matplotlib.ft2font import FT2Font

    assert not set(glyphs.TRAIN_FONTS) & set(glyphs.TEST_FONTS)
    for font in glyphs.TRAIN_FONTS + glyphs.TEST_FONTS:
        characters = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"))).get_charmap()
        assert {ord(c) for c in glyphs.CLASSES} <= characters.keys()


def test_a_glyph_is_drawn_by_its_own_font():
    """The same letter by the same random numbers, but in another font, is another picture."""
    a, _ = glyphs.make(("DejaVuSans",), 36, seed=0)
    b, _ = glyphs.make(("cmr10",), 36, seed=0)
    assert all((x != y).any() for x, y in zip(a, b, strict=True))


def test_images_are_floats_from_minus_one_to_one():
    assert torch.equal(to_floats(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))
    images = load_images("glyphs", count=180)
    torch.manual_seed(0)
    x, labels = images.batch(7)
    assert x.shape == (7, 1, 32, 32) and labels.shape == (7,) and images.shape == (1, 32, 32)
    assert x.min() == -1 and x.max() <= 1
    parts = list(images.test_batches(10, 25))
    assert [len(y) for _, y in parts] == [10, 10, 5] and torch.equal(parts[0][0], to_floats(images.test[:10]))


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_cifar_is_read_record_by_record(tmp_path, monkeypatch, kind):
    if kind == "folder":
        write_folder(tmp_path, members())
    else:  # the official one, had it these records
        path = write_archive(tmp_path / "cifar-10-binary.tar.gz", members())
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(cifar.ARCHIVES, "cifar10", replace(cifar.ARCHIVES["cifar10"], md5=md5))
    train, test, names = cifar.load("cifar10", tmp_path)
    assert names == NAMES and train[0].shape == (30, 3, 32, 32) and test[0].shape == (6, 3, 32, 32)
    expected = records(6, 2)  # data_batch_2 follows data_batch_1
    assert np.array_equal(train[1][6:12], expected[:, 0])
    assert train[0][8, 1, 3, 5] == expected[2, 1 + 1024 + 3 * 32 + 5], "green, row 3, column 5"


def test_cifar100_takes_the_fine_label(tmp_path):
    inside = tmp_path / "cifar-100-binary"
    inside.mkdir()
    data = records(5, 0, classes=100, label_bytes=2)
    for name in ("train.bin", "test.bin"):
        (inside / name).write_bytes(data.tobytes())
    (inside / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)))
    train, _, _ = cifar.load("cifar100", tmp_path)
    assert np.array_equal(train[1], data[:, 1])


def test_an_archive_with_another_checksum_is_not_trusted(tmp_path):
    write_archive(tmp_path / "cifar-10-binary.tar.gz", members())
    with pytest.raises(UsageError, match="md5"):
        cifar.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data_batch_3.bin", records(6, 3).tobytes()[:-1], "cannot reshape"),
        ("data_batch_1.bin", b"\x0a" + records(1, 0).tobytes()[1:], "the label 10, but 10 classes"),
        ("batches.meta.txt", b"cat\ndog\n", "but 2 classes"),
        ("data_batch_5.bin", None, "data_batch_5.bin"),
    ],
)
def test_damaged_folders_are_named(tmp_path, name, content, message):
    files = members() | {name: content}
    write_folder(tmp_path, {name: content for name, content in files.items() if content is not None})
    with pytest.raises(UsageError, match=message) as caught:
        cifar.load("cifar10", tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def numbered(channels=1, mirrors=True):
    """Random images whose labels are their row numbers, so that a batch says which images it holds."""
    pixels = torch.randint(1, 256, (400, channels, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    rows = torch.arange(400)
    return Images(pixels, rows, pixels, rows, [""] * 400, mirrors, "")


def test_a_flip_mirrors_about_half_and_letters_never():
    torch.manual_seed(0)
    x, rows = (images := numbered()).batch(400, "flip")
    plain = to_floats(images.train[rows])
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert 150 < mirrored.sum() < 250 and torch.equal(x[~mirrored], plain[~mirrored])
    for mirrors, augmentation in [(False, "flip"), (True, "none"), (False, "none")]:
        x, rows = numbered(mirrors=mirrors).batch(400, augmentation)
        assert torch.equal(x, to_floats(images.train[rows]))


@pytest.mark.parametrize("mirrors", [False, True])
def test_the_standard_augmentation_shifts_and_mirrors_what_may_be_mirrored(mirrors):
    torch.manual_seed(1)
    x, rows = (images := numbered(channels=3, mirrors=mirrors)).batch(60, "standard")
    shifts, flips = set(), 0
    for after, row in zip(x, rows, strict=True):
        padded = torch.nn.functional.pad(images.train[row], (4,) * 4)
        found = [
            (i, j, flipped)
            for flipped in (False, True)
            for i in range(9)
            for j in range(9)
            if torch.equal(to_floats((padded.flip(-1) if flipped else padded)[:, i : i + 8, j : j + 8]), after)
        ]
        assert len(found) == 1, "one shift, by up to 4 pixels each way"
        shifts.add(found[0][:2])
        flips += found[0][2]
    assert len(shifts) > 20 and (15 < flips < 45 if mirrors else flips == 0)


@pytest.mark.skipif(not MAKE_CIFAR.exists(), reason="no local copy of CIFAR-10")
def test_real_photographs_are_read(tmp_path):
    subprocess.run([sys.executable, MAKE_CIFAR, tmp_path, "--train", "60", "--test", "20"], check=True)
    images = load_images("cifar10", tmp_path)
    assert images.train.shape == (60, 3, 32, 32) and len(images.test) == 20 and images.classes == NAMES
    neighbours = (images.train[..., 1:].float() - images.train[..., :-1].float()).abs().mean()
    assert neighbours < 20, "neighbouring pixels of a photograph are alike: planes and rows are in their places"
