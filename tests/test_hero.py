import json

import pytest
import torch
from PIL import Image

import train_dit
from experiments import hero
from nano_db.partition import make_partition
from nano_db.sampler import euler_walk
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
    for flags, message in ((("--run", tmp_path / "nothing"), "with --run"), (("--word", ""), "--word is empty")):
        code, _, err = cli(*flags, main=hero.main)
        assert code == 2 and message in err and err.count("\n") == 1
