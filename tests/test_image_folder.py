"""Pictures of one's own: what is read from a folder, and what is refused."""

import json
import os
import random
from pathlib import PosixPath

import numpy as np
import pytest
from PIL import Image

import train_dit
import train_vit
from data import image_folder
from data.images import EDM, load_images
from nano_db.errors import UsageError
from nano_db.images import TEST, VALIDATION
from nano_db.partition import make_partition

SIZES = ((40, 56), (64, 48), (33, 33), (90, 31))  # width, height


def save(path, mode="RGB", size=(40, 30), colour=(200, 30, 60), **options):
    """A picture of one colour, but for a white stripe in its middle: twelve pixels wide, from top to bottom."""
    image = Image.new("RGB", size, colour)
    image.paste((255, 255, 255), (size[0] // 2 - 6, 0, size[0] // 2 + 6, size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(path, **options)
    return path


def fill(folder, count=20, classes=("cat", "dog"), **options):
    for name in classes:
        for i in range(count):
            save(folder / name / f"{i}.png", **options)
    return folder


# --- one picture ---


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("size", SIZES)
def test_the_short_side_is_resized_and_the_middle_is_cut_out(tmp_path, suffix, size):
    """Against a slow reference: of the square in the middle, the mean of the pixels that fall into each of the 8."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    coarse.save(tmp_path / f"a.{suffix}", **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    side, array = min(size), np.asarray(coarse, float)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    fine = np.repeat(np.repeat(array[top : top + side, left : left + side], 8, 0), 8, 1)  # (8 side, 8 side, 3)
    expected = fine.reshape(8, side, 8, side, 3).mean((1, 3))
    found = image_folder.read(tmp_path / f"a.{suffix}", 8)
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    assert np.abs(found - expected).mean() < 8  # the edges of bicubic resizing reach further


def test_grey_palette_transparent_and_16_bit_pictures_are_what_they_look_like(tmp_path):
    colour = image_folder.read(save(tmp_path / "a.png"), 30)
    assert tuple(colour[0, 0]) == (200, 30, 60) and tuple(colour[15, 15]) == (255, 255, 255)
    assert image_folder.read(save(tmp_path / "z.png", colour=(7, 7, 7)), 30).ndim == 2, "grey, though it has colours"
    assert image_folder.read(save(tmp_path / "z.png", "P", colour=(7, 7, 7)), 30).ndim == 2
    grey = image_folder.read(save(tmp_path / "b.png", "L"), 30)
    assert grey.shape == (30, 30) and grey[15, 15] == 255
    assert np.array_equal(grey, np.asarray(Image.fromarray(colour).convert("L")))
    assert np.abs(image_folder.read(save(tmp_path / "c.png", "P"), 30).astype(int) - colour).max() <= 8
    black_white = image_folder.read(save(tmp_path / "d.png", "1"), 30)
    assert black_white.ndim == 2 and set(np.unique(black_white)) <= set(range(256)) and black_white[15, 15] == 255
    for mode, hidden in (("RGBA", (9, 8, 7, 0)), ("LA", (9, 0))):
        Image.new(mode, (4, 4), hidden).save(tmp_path / "e.png")
        assert (image_folder.read(tmp_path / "e.png", 4) == 255).all(), "transparent is white"
    palette = Image.new("RGB", (4, 4), (9, 9, 9)).quantize(4)
    palette.save(tmp_path / "f.png", transparency=palette.getpixel((0, 0)))
    assert (image_folder.read(tmp_path / "f.png", 4) == 255).all()
    deep = np.repeat(np.arange(0, 65536, 257, dtype=np.uint16)[:256, None], 256, 1)
    Image.fromarray(deep).save(tmp_path / "g.png")
    assert np.array_equal(image_folder.read(tmp_path / "g.png", 256), np.repeat(np.arange(256)[:, None], 256, 1))
    deep[:100] = 4321
    Image.fromarray(deep).save(tmp_path / "g.png", transparency=4321)
    assert (image_folder.read(tmp_path / "g.png", 256)[:100] == 255).all()
    cmyk = image_folder.read(save(tmp_path / "h.jpg", "CMYK", quality=95), 30)
    assert cmyk.shape == (30, 30, 3) and np.abs(cmyk.astype(int) - colour).mean() < 12


def test_a_photograph_that_was_taken_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    array = np.zeros((20, 20, 3), np.uint8)
    array[:, :10] = 255  # the left half is white: turned right it is the upper one
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    found = image_folder.read(tmp_path / "a.png", 20)
    assert (found[:9] == 255).all() and (found[11:] == 0).all()


# --- a folder ---


def test_a_tenth_of_each_class_is_held_out_and_the_same_one_everywhere(tmp_path):
    fill(tmp_path / "a", 20)
    save(tmp_path / "a" / "rare" / "1.PNG")
    save(tmp_path / "a" / "rare" / "deeper" / "2.jpeg")
    (train, labels), (test, test_labels), classes = image_folder.load(tmp_path / "a", 16)
    assert classes == ["cat", "dog", "rare"] and train.shape == (37, 3, 16, 16) and test.shape == (5, 3, 16, 16)
    assert np.bincount(labels).tolist() == [18, 18, 1] and np.bincount(test_labels).tolist() == [2, 2, 1]
    sides = image_folder.held_out(image_folder.classes_of(tmp_path / "a"), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    again = image_folder.held_out(image_folder.classes_of(tmp_path / "b"), tmp_path / "b")
    names = [[path.name for paths in side.values() for path in paths] for side in (*sides, *again)]
    assert names[:2] == names[2:] and names[1][:2] != names[1][2:4], "of each class others"
    more = fill(tmp_path / "b", 30)
    _, after = image_folder.held_out(image_folder.classes_of(more), more)
    assert len(after["cat"]) == 3


def test_the_first_held_out_pictures_are_of_all_classes_and_so_is_each_half(tmp_path):
    """--test-images takes the first; every other picture is for validation. A class has 3, 4 or 1 of them."""
    for name, count in (("cat", 30), ("dog", 40), ("rare", 2)):
        fill(tmp_path, count, classes=(name,))
    _, (_, labels), _ = image_folder.load(tmp_path, 8)
    assert labels.tolist() == [0, 0, 1, 1, 2, 0, 1, 1]
    assert set(labels[VALIDATION].tolist()) >= {0, 1} <= set(labels[TEST].tolist())


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Test")])
def test_folders_train_and_test_are_taken_as_they_are(tmp_path, names):
    fill(tmp_path / names[0], 3)
    fill(tmp_path / names[1], 2, classes=("dog",))
    (train, labels), (test, test_labels), classes = image_folder.load(tmp_path, 8)
    assert (len(train), len(test), classes) == (6, 2, ["cat", "dog"])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and test_labels.tolist() == [1, 1]


def test_colour_if_one_is_coloured_and_grey_if_none_is(tmp_path):
    fill(tmp_path, 3, mode="L")
    grey, _, _ = image_folder.load(tmp_path, 8)
    assert grey[0].shape == (4, 1, 8, 8)
    save(tmp_path / "cat" / "colour.png")
    mixed, test, _ = image_folder.load(tmp_path, 8)
    assert mixed[0].shape == (5, 3, 8, 8) and test[0].shape == (2, 3, 8, 8)
    greys = [image for image in (*mixed[0], *test[0]) if (image[0] == image[1]).all() and (image[1] == image[2]).all()]
    assert len(greys) == 6, "a grey picture is grey in colour, too"


def test_files_that_are_no_pictures_are_left_out_and_said(tmp_path, capsys):
    fill(tmp_path, 2)
    (tmp_path / "cat" / "notes.txt").write_text("a cat")
    (tmp_path / "cat" / ".DS_Store").write_text("hidden")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.md").write_text("beside the classes")
    save(tmp_path / "beside.png")
    save(tmp_path / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / "cat" / "a folder.png").mkdir()
    (train, _), (test, _), classes = image_folder.load(tmp_path, 8)
    assert len(train) == len(test) == 2 and classes == ["cat", "dog"]
    out = capsys.readouterr().out
    assert "files skipped, not a PNG or JPEG in a class folder: 3, such as" in out


def broken(content):
    def make(folder):
        fill(folder, 2)
        (folder / "cat" / "broken.png").write_bytes(content)

    return make


def truncated(folder):
    path = save(fill(folder, 2) / "dog" / "cut.jpg", size=(200, 200))
    path.write_bytes(path.read_bytes()[:-700])


def bomb(folder):
    Image.new("1", (10_000, 9000)).save(fill(folder, 2) / "cat" / "bomb.png")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "holds no folders: put the pictures of each class"),
        (lambda folder: save(folder / "1.png"), "holds no folders: put the pictures of each class"),
        (lambda folder: fill(folder, 1), "0.png is the only picture of its class"),
        (lambda folder: fill(folder, 9, classes=("cat",)), "one held-out picture is too few"),
        (lambda folder: (fill(folder, 2) / "empty").mkdir(), "empty holds no PNG or JPEG"),
        (lambda folder: save(fill(folder, 2) / "cow" / "1.webp"), "cow holds no PNG or JPEG: convert the"),
        (lambda folder: fill(folder / "train", 2), "a split needs exactly the folders train and test"),
        (lambda folder: fill(fill(folder / "train", 2).parent / "val", 2), "holds the folders train, val"),
        (lambda folder: fill(folder, 2, classes=("train", "car")), "if one of them is a class, rename it"),
        (lambda folder: fill(fill(folder / "train", 2).parent / "test", 1, ("cow",)), "the class cow has pictures to"),
        (lambda folder: fill(folder, 2, classes=("a\nb",)), "'a\\nb' contains unprintable characters"),
        (broken(b""), "broken.png cannot be read as PNG or JPEG"),
        (broken(b"GIF89a" + bytes(100)), "broken.png cannot be read as PNG or JPEG"),
        (truncated, "cut.jpg cannot be read as PNG or JPEG"),
        (lambda folder: (fill(folder, 2) / "cat" / "a\nb.png").write_bytes(b""), "a\\nb.png' cannot be read"),
        (bomb, "bomb.png cannot be read as PNG or JPEG"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_line(tmp_path, make, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder)
    with pytest.raises(UsageError) as error:
        image_folder.load(folder, 8)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(fill(tmp_path, 2) / "cat" / "pipe.png")
    assert len(image_folder.load(tmp_path, 8)[0][0]) == 2


def test_a_class_without_pictures_to_test_on_is_said(tmp_path, capsys):
    fill(tmp_path / "train", 2)
    fill(tmp_path / "test", 2, classes=("dog",))
    image_folder.load(tmp_path, 8)
    assert "without pictures to test on: cat" in capsys.readouterr().out


def test_reading_many_pictures_says_how_far_it_is_and_what_they_take(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_folder, "REPORT_EVERY", -1)
    image_folder.load(fill(tmp_path, 4), 64)
    assert "read 4 of 8 pictures, 0 s left" in capsys.readouterr().out
    monkeypatch.setattr(image_folder, "LARGE", 10_000)
    image_folder.load(tmp_path, 512)
    assert "reading 8 pictures of 512 x 512 pixels: at most 6 MiB" in capsys.readouterr().out


def test_more_than_the_memory_holds_is_one_line_that_names_the_flag(tmp_path, monkeypatch):
    def empty(*_):
        raise MemoryError

    fill(tmp_path, 4)
    monkeypatch.setattr(image_folder.np, "empty", empty)
    with pytest.raises(UsageError, match=r"8 pictures of 1000 x 1000 pixels take 0\.0 GiB; choose a smaller --image"):
        image_folder.load(tmp_path, 1000)


def test_300_mutated_pictures_are_read_or_refused_in_one_line(tmp_path):
    rng, refused = random.Random(11), 0
    modes = (("png", "RGB"), ("png", "P"), ("png", "LA"), ("jpg", "RGB"), ("jpg", "L"), ("png", "1"))
    contents = [save(tmp_path / f"{mode}.{suffix}", mode, (37, 29)).read_bytes() for suffix, mode in modes]
    path = tmp_path / "mutated.png"  # what counts is what is inside
    for i in range(300):
        content = bytearray(contents[i % len(contents)])
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(bytes(content))
        try:
            found = image_folder.read(path, 16)
            assert found.shape in ((16, 16), (16, 16, 3)) and found.dtype == np.uint8
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert 0 < refused < 300


# --- noise levels ---


def test_of_ones_own_pictures_the_noise_levels_are_measured(tmp_path):
    """Pixels that are 40 or 220: the standard deviation of floats in [-1, 1] is (220 - 40) / 127.5 / 2."""
    for name in ("a", "b"):
        for i in range(10):
            array = np.full((8, 8), 40, np.uint8)
            array[:, :4] = 220
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{i}.png")
    images = load_images(str(tmp_path), size=8)
    assert images.sigma_data == pytest.approx(90 / 127.5, abs=1e-5)
    assert np.exp(images.p_mean) / images.sigma_data == pytest.approx(np.exp(EDM[0]) / EDM[1], rel=1e-4)
    assert not images.mirrors and load_images("glyphs", count=100).sigma_data == 0.9


# --- training ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 pictures in four sizes and four modes: a class has a bright, a middling or a dark square in the middle."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(("bright", "dark", "日本 $x_$")):  # a name that a plot could take for mathematics
        (folder / name).mkdir()
        for i in range(66 + (label < 2)):
            w, h = SIZES[i % 4]
            image = Image.new("RGB", (w, h), tuple(int(c) for c in rng.integers(60, 120, 3)))
            image.paste(
                ((240, 230, 220), (10, 0, 20), (170, 160, 180))[label], (w // 3, h // 4, 2 * w // 3, 3 * h // 4)
            )
            mode, suffix = (("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "png"))[i // 4 % 4]
            image = image.quantize(16) if mode == "P" else image.convert(mode)
            image.save(folder / name / f"{i}.{suffix}")
    return folder


TINY = ("--preset", "tiny", "--layers", "3", "--steps", "30", "--device", "cpu")


@pytest.mark.whole
def test_a_vit_is_trained_on_a_folder(cli, pictures, tmp_path):
    flags = (*TINY, "--learning-rate", "0.01", "--data", pictures, "--out", tmp_path / "run")
    code, out, err = cli(*flags, main=train_vit.main)
    assert code == 0 and "182 pictures to train on, 18 held out, 3 classes" in out, err
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["metrics"]["accuracy"] > 0.5 and (tmp_path / "run" / "samples.png").stat().st_size > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["depends_on"]["data_sha256"] == load_images(str(pictures)).sha256
    code, out, err = cli("--eval-only", "--out", tmp_path / "run", main=train_vit.main)
    assert code == 0 and f"{result['metrics']['accuracy']:.4f}" in out, err


@pytest.mark.whole
def test_a_dit_is_trained_on_a_folder_at_noise_levels_of_its_own(cli, pictures, tmp_path):
    flags = (*TINY, "--image-size", "16", "--data", pictures, "--out", tmp_path / "run")
    code, out, err = cli(*flags, main=train_dit.main)
    images = load_images(str(pictures), size=16)
    assert code == 0, err
    why = "(measured on the training pixels)"
    assert f"noise levels: p_mean {images.p_mean:.3g} {why}, sigma_data {images.sigma_data:.3g} {why}" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert 0 < result["metrics"]["edm_loss"] < 2 and "frechet_small" in result["metrics"]
    assert (tmp_path / "run" / "samples.png").stat().st_size > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["depends_on"]["sigma_data"] == images.sigma_data and config["keeps"]["shape"] == [3, 16, 16]
    code, out, err = cli(*flags, "--p-mean", "0.4", "--sigma-data", "0.3", main=train_dit.main)
    assert "noise levels: p_mean 0.4 (by flag), sigma_data 0.3 (by flag)" in out
    assert code == 2 and "p_mean" in err and "sigma_data" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("main", [train_dit.main, train_vit.main])
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--image-size", "32"), "--image-size does nothing with --data glyphs"),
        (("--data", "nowhere"), "nowhere is not a folder: choose glyphs, cifar10, cifar100, mnist, fashion-mnist, or"),
        (("--data", "", "--image-size", "16"), "--data is empty"),
        (("--image-size", "12"), "patches of 8 pixels must divide"),
    ],
)
def test_bad_flags_are_one_line_and_leave_no_folder(cli, pictures, tmp_path, main, flags, message):
    data = () if "glyphs" in message or "--data" in flags else ("--data", pictures)
    code, _, err = cli(*TINY, *data, *flags, "--out", tmp_path / "run", main=main)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_of_few_pictures_frechet_small_is_left_out_and_said(cli, tmp_path):
    folder = fill(tmp_path / "pictures", 6)
    code, out, err = cli(*TINY, "--steps", "2", "--data", folder, "--out", tmp_path / "run", main=train_dit.main)
    assert code == 0 and "EDM loss" in out and out.count("frechet_small") == 1, err
    assert "frechet_small is left out: half of 10 training pictures are too few" in out
    flags = ("--frechet-images", "50", "--data", folder, "--out", tmp_path / "other")
    code, out, err = cli(*TINY, *flags, main=train_dit.main)
    assert code == 2 and "--frechet-images 50: the distance needs more than 64" in err and "too few" not in out


@pytest.mark.parametrize("main", [train_dit.main, train_vit.main])
def test_a_run_inside_its_data_is_refused(cli, tmp_path, monkeypatch, main):
    """The pictures that it samples would become a class."""
    monkeypatch.chdir(fill(tmp_path, 4))
    for flags in (("--data", "."), ("--data", tmp_path, "--out", tmp_path / "cat" / "run")):
        code, _, err = cli(*TINY, *flags, main=main)
        assert code == 2 and "lies inside --data" in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat", "dog"]


@pytest.mark.parametrize("main", [train_dit.main, train_vit.main])
def test_names_that_are_too_long_for_the_system_are_one_line(cli, pictures, tmp_path, main):
    for flags in (("--data", "a" * 300), ("--data", pictures, "--init-from", "a" * 300)):
        code, _, err = cli(*TINY, *flags, "--out", tmp_path / "run", main=main)
        assert code == 2 and err.count("\n") == 1, err


def test_a_single_class_can_be_generated_but_not_classified(cli, tmp_path):
    folder = fill(tmp_path / "pictures", 20, classes=("cat",))
    flags = (*TINY, "--steps", "2", "--data", folder, "--out", tmp_path / "run")
    code, _, err = cli(*flags, main=train_vit.main)
    assert code == 2 and "has a single class: there is nothing to learn" in err and err.count("\n") == 1, err
    code, _, err = cli(*flags, main=train_dit.main)
    assert code == 0, err


def test_what_counts_is_what_is_in_a_file_and_not_its_suffix(tmp_path):
    save(tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert image_folder.read(tmp_path / "a.png", 8).shape == (8, 8, 3)


def test_classes_and_pictures_are_in_the_same_order_on_every_system(tmp_path, monkeypatch):
    """Paths of Windows sort without regard to capitals."""
    for name in ("Zebra", "apple", "Ape"):
        for picture in ("b", "C", "a"):
            save(tmp_path / name / f"{picture}.png")
    monkeypatch.setattr(PosixPath, "__lt__", lambda a, b: str(a).lower() < str(b).lower())
    classes = image_folder.classes_of(tmp_path)
    assert list(classes) == ["Ape", "Zebra", "apple"]
    assert [path.name for path in classes["apple"]] == ["C.png", "a.png", "b.png"]
    sides = image_folder.held_out(classes, tmp_path)
    assert all([path.name for path in side["apple"]] == sorted(path.name for path in side["apple"]) for side in sides)


def test_of_fewer_than_sixteen_held_out_pictures_sixteen_are_classified_for_the_cost(tmp_path):
    settings = train_vit.Settings(layers=1, blocks=1, width=8, heads=2, patch=8, device="cpu")
    images = load_images(str(fill(tmp_path, 4)), size=16)
    partition = make_partition(train_vit.NOISE["nano"], 1)
    block = train_vit.build(0, settings, images, partition).eval()
    assert len(images.test) == 2 and len(train_vit.sample([block], 16, settings, images, partition)) == 16


def test_odd_exif_is_no_reason_to_refuse_a_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    at = content.index(b"a camera")
    read = 0
    for i in range(20, at):  # the head of EXIF
        (tmp_path / "a.jpg").write_bytes(content[:i] + b"\xff" + content[i + 1 :])
        try:
            read += image_folder.read(tmp_path / "a.jpg", 8).shape == (8, 8, 3)
        except UsageError as error:
            assert "\n" not in str(error)
    assert read > (at - 20) // 2
