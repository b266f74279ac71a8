import json

import pytest
import torch
from conftest import ROOT
from PIL import Image

import train_dit
from experiments import hero
from nano_db.partition import make_partition
from nano_db.sampler import State, euler_walk
from nano_db.schedule import LogNormal, equal_probability_grid

DIT = ("--preset", "tiny", "--steps", "4", "--samples", "0", "--device", "cpu")


def test_each_picture_lights_the_active_block():
    """Of two blocks and a denoiser that knows its image; counted by the colour of the box."""
    noise = LogNormal(0.5, 1.2, 0.002, 80.0)
    partition, clean = make_partition(noise, 2), torch.rand(3, 1, 8, 8)
    z, grid = 80.0 * torch.randn(3, 1, 8, 8), equal_probability_grid(noise, 4)
    states = list(euler_walk(lambda z, sigma: clean, z, grid))
    batches = [[(z, torch.full((3,), middle), clean)] * 3 for middle in (3.0, 0.5)]
    pictures = hero.frames(batches, states, partition, 0.9)
    assert len(pictures) == 2 * 3 + 4 and pictures[-1][1] == hero.SECONDS["end"]
    darkness = []
    for picture, _ in pictures:
        boxes = picture.crop((120, 20, 280, 60)), picture.crop((520, 20, 680, 60))
        darkness.append([255 - sum(box.convert("L").resize((1, 1)).tobytes()) for box in boxes])
    lit = [int(right > left) for left, right in darkness]
    assert lit == [1, 1, 1, 0, 0, 0] + [partition.route(float(sigma)) for sigma in grid[:-1]]


def test_a_batch_shows_letters_of_the_word_under_noise_of_the_blocks_own_levels():
    settings = train_dit.Settings(**train_dit.PRESETS["tiny"] | {"device": "cpu", "glyphs": 720})
    images, partition = train_dit.prepare(settings)
    labels = torch.tensor([images.classes.index(letter) for letter in "HHI"]).repeat(20)
    torch.manual_seed(0)
    for b in range(partition.blocks):
        z, sigma, clean = hero.training_batch(images, labels, partition, b)
        low, high = partition.training_range(b)
        assert (low <= sigma).all() and (sigma <= high).all() and len(sigma.unique()) > 50
        assert ((z - clean).flatten(1).std(1) / sigma).sub(1).abs().max() < 0.15
        for image, label in zip(clean, labels, strict=True):
            of_label = images.training((images.train_labels == label).nonzero()[:, 0])
            assert (of_label == image).flatten(1).all(1).any()


def test_in_training_the_picture_shows_noisy_and_clean_letters_and_in_sampling_the_estimate(monkeypatch):
    shown = []
    monkeypatch.setattr(hero.Scene, "letters", lambda self, **rows: shown.append(rows))
    monkeypatch.setattr(hero.Scene, "picture", lambda self: None)
    partition, clean = make_partition(LogNormal(0.5, 1.2, 0.002, 80.0), 2), torch.rand(3, 1, 8, 8)
    batches = [[(clean + b + 1, torch.full((3,), 2.0), clean - b)] for b in range(2)]
    hero.frames(batches, [State(0.0, clean, clean / 2)], partition, 1.0)
    training, sampling = shown[:2], shown[2]
    for rows, b in zip(training, (1, 0), strict=True):
        torch.testing.assert_close(rows["noisy"], (clean + b + 1) / 5**0.5)
        assert torch.equal(rows["clean"], clean - b)
    assert torch.equal(sampling["noisy"], clean) and torch.equal(sampling["estimate"], clean / 2)


@pytest.mark.slow
def test_it_is_made_of_a_run(cli, tmp_path):
    run, out = tmp_path / "run", tmp_path / "pictures"
    code, _, err = cli(*DIT, "--out", run, main=train_dit.main)
    assert code == 0, err
    code, said, err = cli("--run", run, "--word", "HI", "--out", out, main=hero.main)
    assert code == 0 and "hero.gif" in said, err
    with Image.open(out / "hero.gif") as animation, Image.open(out / "hero.png") as still:
        assert animation.n_frames > 10 and animation.size == still.size
    config = json.loads((run / "config.json").read_text())
    later = config | {"settings": config["settings"] | {"of_a_later_version": 1}}
    (run / "config.json").write_text(json.dumps(later))
    code, _, err = cli("--run", run, "--word", "a", "--out", out, main=hero.main)
    assert code == 2 and "has no class 'a'" in err and err.count("\n") == 1


def test_bad_flags_get_one_line(cli, tmp_path):
    cases = ("--run", tmp_path / "nothing"), ("--word", ""), ("--seed", 2**63)
    for flags, message in zip(cases, ("with --run", "--word is empty", "--seed must be"), strict=True):
        code, _, err = cli(*flags, main=hero.main)
        assert code == 2 and message in err and err.count("\n") == 1


def test_the_readmes_animation_is_small():
    assert (ROOT / "docs" / "pictures" / "hero.gif").stat().st_size < 1_500_000
