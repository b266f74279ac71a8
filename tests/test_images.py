import gzip
import hashlib
import io
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dit
import train_vit
from data import cifar, glyphs, mnist
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
        ("data_batch_1.bin", b"\x0a" + records(1, 0).tobytes()[1:], "found label 10, but only 10 classes"),
        ("batches.meta.txt", b"cat\ndog\n", "but only 2 classes"),
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


# --- CIFAR-10 as torchvision unpacks it ---


def string(text):
    """A string as Python 2 pickled it: what Python 3 writes is another opcode."""
    content = text if isinstance(text, bytes) else text.encode()
    return (
        b"U" + bytes([len(content)]) + content
        if len(content) < 256
        else b"T" + struct.pack("<I", len(content)) + content
    )


def listed(items):
    """A list, put down in parts of four, as pickles have parts of a thousand."""
    parts = [b"".join(items[i : i + 4]) for i in range(0, len(items), 4)]
    return b"]q\x05" + b"".join(b"(" + part + b"e" for part in parts)


def pickled_batch(labels, pixels, columns_first):
    """What a file of the archive for Python looks like inside, by the protocol 2 that it has."""
    data = (pixels.T if columns_first else pixels).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85U\x01b\x87Rq\x08(K\x01"
    array += b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", 3072) + b"\x86cnumpy\ndtype\nq\x09U\x02u1"
    array += b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + (
        b"\x88" if columns_first else b"\x89"
    )
    array += string(data) + b"tb"
    numbers, names = listed([b"K" + bytes([label]) for label in labels]), listed([string(f"{i}.png") for i in labels])
    content = b"\x80\x02}q\x01(" + string("batch_label") + string("training batch 1 of 5")
    return content + string("labels") + numbers + string("data") + array + string("filenames") + names + b"u."


@pytest.mark.parametrize("columns_first", [False, True])
def test_cifar_is_read_from_the_folder_that_torchvision_unpacks(tmp_path, monkeypatch, columns_first):
    write_folder(tmp_path, members())
    expected = cifar.load("cifar10", tmp_path)
    inside = tmp_path / "there" / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    about, files = cifar.ARCHIVES["cifar10"], {}
    for name in about.python_files:
        if name == "batches.meta":
            keys = (
                string("num_cases_per_batch") + b"M\x10'" + string("label_names") + listed([string(n) for n in NAMES])
            )
            files[name] = b"\x80\x02}q\x01(" + keys + string("num_vis") + b"M\x00\x0cu."
        else:
            batch = np.frombuffer(members()[f"{name}.bin"], np.uint8).reshape(-1, 3073)
            files[name] = pickled_batch(batch[:, 0].tolist(), batch[:, 1:], columns_first)
        (inside / name).write_bytes(files[name])
    assert cifar.is_here("cifar10", tmp_path / "there")
    with pytest.raises(UsageError, match="data_batch_1 is not the official file"):
        cifar.load("cifar10", tmp_path / "there")
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", replace(about, python_files=sums))
    found = cifar.load("cifar10", tmp_path / "there")
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
        assert ours[0].dtype == theirs[0].dtype and ours[1].dtype == theirs[1].dtype
    assert found[2] == NAMES
    (inside / "test_batch").unlink()
    with pytest.raises(UsageError, match="test_batch cannot be read"):
        cifar.load("cifar10", tmp_path / "there")


# --- MNIST ---


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_idx_files_are_read_and_nothing_else_is():
    random = np.random.default_rng(0)
    for shape in ((3, 28, 28), (7,), (1, 2, 3, 4)):
        array = random.integers(256, size=shape, dtype=np.uint8)
        assert np.array_equal(mnist.parse_idx(idx(array)), array)
    sound = idx(random.integers(256, size=(3, 28, 28), dtype=np.uint8))
    for damaged in (
        b"",
        sound[:3],
        sound[:9],
        sound[:-1],
        sound + b"0",
        b"\x01" + sound[1:],
        sound[:2] + b"\x0d" + sound[3:],
    ):
        with pytest.raises(ValueError):
            mnist.parse_idx(damaged)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_is_read_from_its_official_files_with_a_black_margin(tmp_path, monkeypatch, name):
    random, files = np.random.default_rng(1), {}
    arrays = [random.integers(1, 256, (count, 28, 28), np.uint8) for count in (30, 20)]
    labels = [np.arange(count, dtype=np.uint8) % 10 for count in (30, 20)]
    contents = [idx(a) for pair in zip(arrays, labels, strict=True) for a in pair]
    for file, content in zip(mnist.FILES, contents, strict=True):
        path = tmp_path / name / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(content))
        files[file] = (hashlib.md5(path.read_bytes()).hexdigest(), path.stat().st_size)
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte\.gz is not the expected file"):
        load_images(name, tmp_path)
    monkeypatch.setitem(mnist.SOURCES, name, replace(mnist.SOURCES[name], files=files))
    images = load_images(name, tmp_path)
    assert images.shape == (1, 32, 32) and (len(images.train), len(images.test), len(images.classes)) == (30, 20, 10)
    assert (
        np.array_equal(images.train[:, 0, 2:30, 2:30], arrays[0]) and images.train_labels.tolist() == labels[0].tolist()
    )
    assert int((images.test > 0).sum()) == 20 * 28 * 28, "the margin is black"
    assert images.mirrors == (name == "fashion-mnist"), "a mirrored 2 is none"


@pytest.mark.parametrize("script", [train_vit, train_dit])
def test_a_script_trains_on_mnist(cli, tmp_path, monkeypatch, script):
    """Files made here, by the checksums that they have."""
    random, files = np.random.default_rng(2), {}
    for file, count in zip(mnist.FILES, (60, 60, 20, 20), strict=True):
        labels = np.arange(count, dtype=np.uint8) % 10
        drawn = random.integers(0, 40, (count, 28, 28), np.uint8)
        path = tmp_path / "data" / "cache" / "mnist" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx(drawn if "images" in file else labels)))
        files[file] = (hashlib.md5(path.read_bytes()).hexdigest(), path.stat().st_size)
    monkeypatch.setitem(mnist.SOURCES, "mnist", replace(mnist.SOURCES["mnist"], files=files))
    monkeypatch.chdir(tmp_path)
    more = ("--frechet-images", "0", "--sampling-steps", "3") if script is train_dit else ()
    flags = ("--preset", "tiny", "--layers", "3", "--steps", "3", "--samples", "2", "--device", "cpu", *more)
    code, out, err = cli(*flags, "--data", "mnist", "--out", "run", main=script.main)
    assert code == 0 and ("EDM loss" in out or "accuracy" in out), err
    assert script is train_vit or "(measured on the training pixels)" in out
