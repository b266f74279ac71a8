"""The pictures that a run leaves: its curves, and its samples."""

import math
import os
import warnings
from pathlib import Path

import matplotlib

if "MPLBACKEND" not in os.environ:  # a notebook has set it, to show figures in its cells
    matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import numpy as np

from nano_db.images import TEST
from nano_db.trainer.checkpoints import explained, read_metrics, write_atomically


def block_colours(blocks):
    """One colour per block. The light end of the scale, which is faint on white, is left out."""
    return [plt.get_cmap("viridis")(0.7 * b / max(1, blocks - 1)) for b in range(blocks)]


def save_figure(figure, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class name may have letters that the font lacks
        write_atomically(Path(path), lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


def draw_curves(folder, metric, shares=()):
    """curves.png of a run: training loss by block, the held-out `metric` by round, and its `shares` by block."""
    training, evaluations = read_metrics(folder, "train"), read_metrics(folder, "evaluation")
    blocks, panels = sorted({record["block"] for record in training}), 3 if len(shares) > 1 else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 3.6), layout="constrained")
    for b, colour in zip(blocks, block_colours(len(blocks)), strict=True):
        records = [record for record in training if record["block"] == b]
        axes[0].plot([r["step"] for r in records], [r["loss"] for r in records], color=colour, label=f"block {b}")
    axes[0].set(xlabel="step", ylabel="training loss", title="training loss")
    if len(blocks) > 1:
        axes[0].legend()
    axes[1].plot([r["step"] for r in evaluations], [r[metric] for r in evaluations], "o-", color="black")
    axes[1].set(xlabel="steps of each block", ylabel=metric.replace("_", " "), title="held-out")
    if len(shares) > 1:
        axes[2].bar(range(len(shares)), shares, color=block_colours(len(shares)))
        axes[2].set(xlabel="block (0 is the noisiest)", ylabel="nats per token", title="each block's share")
        axes[2].set_xticks(range(len(shares)))
    save_figure(figure, Path(folder) / "curves.png")


def short(name, length):
    """The name of a class, cut where a title has no room for more."""
    return name if len(name) <= length else name[: length - 1] + "…"


def draw_classification(path, images, log_p, labels, metrics, hardest):
    """samples.png of a classifier: the test images that surprise it most, and for blocks its accuracy along the walk.

    log_p (N, V) and labels (N,) of the first N held-out images; only those of the test half are shown.
    """
    surprise, guesses = -log_p.gather(1, labels[:, None])[:, 0], log_p.argmax(-1)
    in_test = range(len(labels))[TEST]
    chosen = [in_test[i] for i in surprise[TEST].topk(min(hardest, len(in_test))).indices]
    tiles = [image / 127.5 - 1 for image in images.test[chosen].float()]
    titles = [f"{short(images.classes[labels[i]], 9)} -> {short(images.classes[guesses[i]], 9)}" for i in chosen]
    walks = "accuracy_walk" in metrics
    figure, axes = plt.subplots(1, 1 + walks, figsize=(5 + 5 * walks, 4.8), layout="constrained", squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    _show_mosaic(left, tiles, titles, columns=5, gap=16)
    left.set_title("the hardest test images: true -> predicted")
    if walks:
        for name, style, label in (("noise_free", "o-", "from z = 0"), ("walk", "s--", "from noise")):
            right.plot(metrics[f"accuracy_{name}_after_each_block"], style, label=label)
        right.axhline(metrics["accuracy_mean_of_walks"], ls=":", color="black", label="mean of walks, at the end")
        right.set(xlabel="after block", ylabel="accuracy on test images", title="accuracy along the walk")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.legend()
    save_figure(figure, path)


def draw_images(path, states, partition, classes, sigma_data, walks=3, columns=13):
    """samples.png of an image generator: images with their classes, and some walks from noise to image.

    states: the whole walk (sampler.State); images (B, C, H, W) in [-1, 1], classes in turn. A walk has two rows: the
    noisy image z, scaled to the range of a clean one, and D, the active block's estimate of it. The frame has the
    colour of the block.
    """
    owners = [partition.route(sigma) for sigma in (partition.edges[0], *(state.sigma for state in states[:-1]))]
    names = [short(classes[i % len(classes)], 14) for i in range(len(states[-1].z))]
    chosen = np.linspace(0, len(states) - 1, min(columns, len(states))).round().astype(int)
    colours = [block_colours(max(owners) + 1)[owners[k]] for k in chosen]
    tiles = []
    for i in range(min(walks, len(names))):
        tiles += [sigma_data / math.hypot(sigma_data, states[k].sigma) * states[k].z[i].cpu() for k in chosen]
        tiles += [states[k].denoised[i].cpu() for k in chosen]
    labels = [f"block {owners[k]}\nto $\\sigma$ = {states[k].sigma:.2g}" for k in chosen]
    heights = [math.ceil(len(names) / columns), len(tiles) / len(chosen) * columns / len(chosen)]  # inches
    size = (columns, sum(heights) + 1.5)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=size, height_ratios=heights, layout="constrained")
    _show_mosaic(top, list(states[-1].z.cpu()), names, columns, gap=8)
    _show_mosaic(bottom, tiles, labels, len(chosen), gap=4, frames=colours * (len(tiles) // len(chosen)))
    bottom.set_title("from noise to image; above: the noisy z, below: the active block's estimate", fontsize=10, pad=32)
    save_figure(figure, path)


def save_images(folder, images):
    """Images (B, C, H, W) in [-1, 1] as <folder>/00000.png and so on. Raises UsageError for a folder it cannot make."""
    with explained(f"cannot make the folder {folder}: move away what is there", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pixels = _pixels(image.expand(3, -1, -1).cpu())
        write_atomically(folder / f"{i:05}.png", lambda file, pixels=pixels: plt.imsave(file, pixels, format="png"))


def _pixels(image):
    """(C, H, W) in [-1, 1] -> (H, W, C) in [0, 1]"""
    return (image.clamp(-1, 1) * 0.5 + 0.5).permute(1, 2, 0).numpy()


def _show_mosaic(ax, images, labels, columns, gap, frames=None):
    """Show images (C, H, W) in [-1, 1] side by side, with labels above the first of them.

    frames: a colour per image, for its label and the inner half of the gap around it.
    """
    H, W = images[0].shape[1:]
    canvas, edge = np.ones((math.ceil(len(images) / columns) * (H + gap) + gap, columns * (W + gap) + gap, 3)), gap // 2
    for i, image in enumerate(images):
        x, y = i % columns * (W + gap) + gap, i // columns * (H + gap) + gap
        if frames:
            canvas[y - edge : y + H + edge, x - edge : x + W + edge] = frames[i][:3]
        canvas[y : y + H, x : x + W] = _pixels(image)
        if i < len(labels):
            colour = frames[i] if frames else "black"
            style = {"ha": "center", "va": "bottom", "fontsize": 7, "parse_math": bool(frames)}  # no class is a formula
            ax.text(x + W / 2, y - 2, labels[i], color=colour, **style)
    ax.imshow(canvas)
    ax.set_axis_off()
