"""The README's animation: blocks are trained one after the other, and then generate letters together.

python train_dit.py                                  # a run to take the blocks from
python -m experiments.hero --seed 1 --out docs/pictures    # writes hero.gif, and hero.png, a still
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch
from PIL import Image

import train_dit
from nano_db.errors import UsageError
from nano_db.partition import sampling_grid
from nano_db.schedule import sample_sigma
from nano_db.trainer.checkpoints import explained, make_folder, read_config
from nano_db.trainer.command import command
from nano_db.trainer.plots import block_colours, plt
from nano_db.trainer.run import Run, noise_identity
from nano_db.trainer.settings import Parser, read_settings

FAINT, PAPER = 0.18, "white"  # opacity of a block that waits; background
SECONDS = {"training": 0.5, "sampling": 0.2, "end": 3.0}
BATCHES = 3  # shown per block in training


def scenes_of(folder, word, seed):
    """What to show of a run of train_dit.py: (batches, states, the Partition, sigma_data).

    batches: per block, some of what training_batch() returns; states: the blocks' walk to the letters of `word`.
    """
    if not word:
        raise UsageError("--word is empty: give it letters")
    if read_config(folder, "--run")["script"] != "dit":
        raise UsageError(f"--run {folder} is not a run of train_dit.py")
    flags = ["--eval-only", "--device", "cpu", "--out", str(folder)]
    settings = read_settings("dit", train_dit.Settings, train_dit.PRESETS, flags=flags)
    if settings.baseline or settings.blocks > 4:
        raise UsageError(f"--run {folder} does not suit the picture, which has room for one to four blocks")
    images, partition = train_dit.prepare(settings)
    if images.missing:
        raise UsageError(images.missing)
    if unknown := set(word) - set(images.classes):
        raise UsageError(f"--word {word}: the run has no class {min(unknown)!r}, only {' '.join(images.classes)}")
    _, sigma_data = train_dit.noise_levels(settings, images)
    depends_on = {"data_sha256": images.sha256, "sigma_data": sigma_data, **noise_identity(partition)}
    run = Run("dit", settings, images.keeps(), **depends_on)
    stack = train_dit.assemble(run.trained_blocks(train_dit.build, images, partition), settings, images, partition)
    labels, sigmas = torch.tensor([images.classes.index(c) for c in word]), sampling_grid(partition, 30)
    states = list(stack.walk(labels, sigmas, settings.guidance, torch.Generator().manual_seed(seed)))
    torch.manual_seed(seed)
    batches = [[training_batch(images, labels, partition, b) for _ in range(BATCHES)] for b in range(partition.blocks)]
    return batches, states, partition, sigma_data


def training_batch(images, labels, partition, b):
    """Training images of these labels, and noise of block b's levels, drawn as in its loss: (z, sigma (n), clean)."""
    rows = [torch.multinomial((images.train_labels == label).float(), 1) for label in labels]
    clean = images.training(torch.cat(rows))
    sigma = sample_sigma(partition.noise, len(clean), *partition.training_range(b))
    return clean + sigma[:, None, None, None] * torch.randn_like(clean), sigma, clean


class Scene:
    """The blocks side by side, and below them letters: noisy, and clean or as the active block estimates them."""

    def __init__(self, partition, letters):
        self.partition, self.colours = partition, block_colours(partition.blocks)
        self.figure = plt.figure(figsize=(8, 4), dpi=100, facecolor=PAPER)
        self.ax = self.figure.add_axes((0, 0.42, 1, 0.58))
        self.ax.set(xlim=(0, 800), ylim=(0, 232))
        self.ax.set_axis_off()
        self.caption = self.ax.text(400, 212, "", ha="center", va="center", size=13)
        self.boxes, self.bars = [], []
        for b, colour in enumerate(self.colours):
            low, high = partition.interval(b)
            middle = 800 * (b + 0.5) / partition.blocks
            box = FancyBboxPatch((middle - 100, 62), 200, 120, "round,pad=0,rounding_size=12", lw=2.5, ec=colour)
            self.boxes.append(self.ax.add_patch(box))
            self.ax.text(middle, 148, f"block {b}", ha="center", size=14, weight="bold")
            self.ax.text(middle, 118, f"noise σ: {high:.2g} to {low:.2g}", ha="center", size=10)
            self.ax.text(middle - 84, 83, "trained", size=9, va="center")
            self.ax.add_patch(plt.Rectangle((middle - 32, 76), 116, 14, fc=PAPER, ec="grey", lw=0.8))
            self.bars.append(self.ax.add_patch(plt.Rectangle((middle - 32, 76), 0, 14, fc=colour, lw=0)))
        self.rows, self.names = [], []
        for y in (0.235, 0.02):
            ax = self.figure.add_axes((0.12, y, 0.86, 0.21))
            ax.set_axis_off()
            self.names.append(ax.text(-0.02, 0.5, "", transform=ax.transAxes, ha="right", va="center", size=10))
            self.rows.append(ax.imshow(mosaic(letters), interpolation="nearest"))

    def light(self, active):
        for b, (box, colour) in enumerate(zip(self.boxes, self.colours, strict=True)):
            box.set_facecolor((*colour[:3], 0.55 if b == active else FAINT / 2))
            box.set_linewidth(4 if b == active else 1.5)

    def letters(self, **rows):
        """Two rows of images, under the names of the arguments."""
        for (name, images), text, row in zip(rows.items(), self.names, self.rows, strict=True):
            text.set_text(name)
            row.set_data(mosaic(images))

    def picture(self):
        self.figure.canvas.draw()
        return Image.fromarray(np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy())


def mosaic(images):
    """Images (n, 1 or 3, H, W) in [-1, 1] side by side as one picture (height, width, 3), with white between."""
    images = torch.nn.functional.pad(images.clamp(-1, 1) / 2 + 0.5, (4, 4, 0, 0), value=1.0).expand(-1, 3, -1, -1)
    return torch.cat([*images], dim=2).permute(1, 2, 0).numpy()


def frames(batches, states, partition, sigma_data):
    """[(picture, seconds)]"""
    scene, found = Scene(partition, states[0].z), []

    def visible(z, sigma):  # noisy images in the range of clean ones
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return z * sigma_data / (sigma**2 + sigma_data**2).sqrt()

    for b in torch.arange(partition.blocks).roll(1).tolist():  # in any order: here the last one first
        scene.light(b)
        scene.caption.set_text(f"Training: block {b} learns to remove noise at its own levels. It sees no other block.")
        for i, (z, sigma, clean) in enumerate(batches[b], 1):
            scene.bars[b].set_width(116 * i / len(batches[b]))
            scene.letters(noisy=visible(z, sigma), clean=clean)
            found.append((scene.picture(), SECONDS["training"]))
    for before, state in zip([partition.edges[0], *(s.sigma for s in states)], states, strict=False):
        b = partition.route(before)
        scene.light(b)
        scene.caption.set_text(f"Sampling: from noise to letters. Block {b} is active, at σ = {before:.2g}")
        scene.letters(noisy=visible(state.z, state.sigma), estimate=state.denoised)
        found.append((scene.picture(), SECONDS["sampling"]))
    plt.close(scene.figure)
    return [*found[:-1], (found[-1][0], SECONDS["end"])]


def main():
    parser = Parser(prog="python -m experiments.hero", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--run", type=Path, default=Path("out/dit-blocks"), help="a finished run (default out/dit-blocks)"
    )
    parser.add_argument("--word", default="BLOCKS", help="letters to generate (default BLOCKS)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the initial noise (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out/hero"), help="output folder (default out/hero)")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed must be at least 0 and below 2^63, not {args.seed}")
    batches, states, *known = scenes_of(args.run, args.word, args.seed)
    pictures = frames(batches, states, *known)
    make_folder(args.out)
    first, *others = (picture.quantize(64, dither=Image.Dither.NONE) for picture, _ in pictures)
    times = [round(1000 * seconds) for _, seconds in pictures]
    with explained(f"cannot write into {args.out}: choose another --out", OSError):
        first.save(args.out / "hero.gif", save_all=True, append_images=others, duration=times, loop=0, optimize=True)
        pictures[-len(states) // 2][0].save(args.out / "hero.png")  # in the middle of the walk
    print(f"written: {args.out / 'hero.gif'}, {(args.out / 'hero.gif').stat().st_size / 1e6:.2f} MB, and hero.png")


if __name__ == "__main__":
    command(main)
