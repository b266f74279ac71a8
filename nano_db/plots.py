"""Pictures: a run's curves, runs side by side, and the idea of the method (`python -m nano_db.plots FILE` draws that
one).
"""

import math
import os
from pathlib import Path

import matplotlib

if "MPLBACKEND" not in os.environ:  # a notebook has set it, to show figures in its cells
    matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import numpy as np
import torch

from nano_db.errors import UsageError
from nano_db.mixture import GaussianMixture
from nano_db.partition import make_partition
from nano_db.run import read_metrics, write_atomically
from nano_db.sampler import euler_walk
from nano_db.schedule import LogNormal
from nano_db.settings import Parser, command

COLOURS = plt.get_cmap("viridis")


def block_colours(blocks):
    return [COLOURS(0.9 * b / max(1, blocks - 1)) for b in range(blocks)]


def draw_curves(folder, metric, unit, shares=()):
    """curves.png of a run: training loss by block, the held-out `metric` by round and its `shares` by block."""
    training, evaluations = read_metrics(folder, "train"), read_metrics(folder, "evaluation")
    blocks = sorted({record["block"] for record in training})
    colours = block_colours(len(blocks))
    panels = 3 if len(shares) > 1 else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 3.6), layout="constrained")
    for b, colour in zip(blocks, colours, strict=True):
        points = [(record["step"], record["loss"]) for record in training if record["block"] == b]
        axes[0].plot(*zip(*points, strict=True), color=colour, label=f"block {b}" if len(blocks) > 1 else None)
    axes[0].set(
        xlabel="step", ylabel="training loss", title="each block's own loss" if len(blocks) > 1 else "training loss"
    )
    axes[1].plot([r["step"] for r in evaluations], [r[metric] for r in evaluations], "o-", color="black")
    axes[1].set(xlabel="steps of each block", ylabel=unit, title="held-out " + metric.replace("_", " "))
    if len(blocks) > 1:
        axes[0].legend()
    if len(shares) > 1:
        axes[2].bar(range(len(shares)), shares, color=block_colours(len(shares)))
        axes[2].set(
            xlabel="block (0 is the noisiest)",
            ylabel="nats a symbol",
            title="what each block answers for",
            xticks=range(len(shares)),
        )
    save_figure(figure, Path(folder) / "curves.png")


def draw_comparison(path, names, rows):
    """One small bar chart a column of the table, one bar a run. rows: dictionaries with the same keys."""
    keys = list(rows[0])
    figure, axes = plt.subplots(1, len(keys), figsize=(2.6 * len(keys), 3.2), layout="constrained", squeeze=False)
    for ax, key in zip(axes[0], keys, strict=True):
        bars = ax.bar(range(len(rows)), [row[key] for row in rows], color=block_colours(len(rows)))
        ax.bar_label(bars, fmt="%.4g", fontsize=8)
        ax.set_title(key.replace("_", " "), fontsize=9)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    save_figure(figure, path)


def draw_by_calls(path, curves, unit):
    """Quality against the number of calls K, a line a run: curves {name: {K: value}}."""
    figure, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for (name, values), colour in zip(curves.items(), block_colours(len(curves)), strict=True):
        ax.plot([int(k) for k in values], list(values.values()), "o-", color=colour, label=name)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="K: calls of the network, or turns of the loop", ylabel=unit)
    ax.legend()
    save_figure(figure, path)


def draw_classification(path, images, log_p, labels, metrics, hardest):
    """samples.png of a classifier: what it takes for what, the test images that surprise it most, and the accuracy
    after each block of the walk. log_p (N, V) and labels (N,) of the first N test images.
    """
    classes, guesses = len(images.classes), log_p.argmax(-1)
    counts = torch.zeros(classes, classes)
    counts.index_put_((labels, guesses), torch.ones(len(labels)), accumulate=True)
    figure, axes = plt.subplots(1, 3 if "accuracy_walk" in metrics else 2, figsize=(15, 4.8), layout="constrained")
    axes[0].imshow((counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy(), cmap="Greys", vmin=0, vmax=1)
    if classes <= 40:
        axes[0].set_xticks(range(classes), images.classes, fontsize=7, rotation=90)
        axes[0].set_yticks(range(classes), images.classes, fontsize=7)
    axes[0].set(xlabel="named", ylabel="true class", title="share of each class (row) named so (column)")

    surprise = -log_p.gather(1, labels[:, None])[:, 0]
    chosen = surprise.topk(min(hardest, len(labels))).indices
    canvas, corners = _mosaic(
        [image / 127.5 - 1 for image in images.test[chosen].float()],
        columns=5,
        gap=12 if max(map(len, images.classes)) == 1 else 20,
    )
    axes[1].imshow(canvas)
    for i, (x, y) in zip(chosen.tolist(), corners, strict=True):
        true, named = images.classes[labels[i]], images.classes[guesses[i]]
        name = f"{true} -> {named}" if len(true + named) == 2 else f"{true}\n-> {named}"
        axes[1].text(x + images.shape[2] / 2, y - 2, name, ha="center", fontsize=7)
    axes[1].set_axis_off()
    axes[1].set_title("the hardest test images: true -> named")

    if "accuracy_walk" in metrics:
        for name, style in (("noise_free", "o-"), ("walk", "s--")):
            shares = metrics[f"accuracy_{name}_after_each_block"]
            axes[2].plot(
                range(len(shares)), shares, style, label={"walk": "from noise", "noise_free": "from z = 0"}[name]
            )
        axes[2].axhline(metrics["accuracy_mean_of_walks"], ls=":", color="black", label="mean of walks, at the end")
        axes[2].set(
            xlabel="after block", ylabel="share of test images named right", title="accuracy along the walk",
            xticks=range(len(shares)),
        )  # fmt: skip
        axes[2].legend()
    save_figure(figure, path)


def draw_images(path, states, owners, names, sigma_data, walks=3, columns=13):
    """samples.png of an image generator: images, titled with their classes, and some walks from noise to image.

    states: of the whole walk (sampler.State), images (B, C, H, W) in [-1, 1]; owners: the block of each call; names
    (B,). A walk is two rows: the noisy image z, scaled to the range of a clean one, and D, what the block at work takes
    it for. The frame's colour is the block's.
    """
    images, walks = states[-1].z.cpu(), min(walks, len(names))
    calls = min(columns, len(states))
    colours = block_colours(max(owners) + 1)
    chosen = np.linspace(0, len(states) - 1, calls).round().astype(int)
    tiles, frames = [], []
    for i in range(walks):
        for kind in ("z", "denoised"):
            for call in chosen:
                scale = sigma_data / math.hypot(sigma_data, states[call].sigma) if kind == "z" else 1.0
                tiles.append(scale * getattr(states[call], kind)[i].cpu())
                frames.append(colours[owners[call]])
    grid, grid_corners = _mosaic(list(images), columns, gap=8)
    strip, strip_corners = _mosaic(tiles, calls, gap=4, frames=frames)

    heights = [columns * canvas.shape[0] / canvas.shape[1] for canvas in (grid, strip)]  # inches
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(columns, sum(heights) + 1), height_ratios=heights, layout="constrained"
    )
    top.imshow(grid)
    for (x, y), name in zip(grid_corners, names, strict=False):
        top.text(x + images.shape[-1] / 2, y - 1, name, ha="center", va="bottom", fontsize=8)
    bottom.imshow(strip)
    for (x, _), call in zip(strip_corners, chosen, strict=False):
        label = f"block {owners[call]}\nto $\\sigma$ = {states[call].sigma:.2g}"
        bottom.text(x + images.shape[-1] / 2, -3, label, ha="center", fontsize=8, color=colours[owners[call]])
    bottom.set_title("from noise to image: above z, below what the block at work takes it for", fontsize=10, pad=32)
    for ax in (top, bottom):
        ax.set_axis_off()
    save_figure(figure, path)


def save_images(folder, images, first):
    """Images (B, C, H, W) in [-1, 1] as <folder>/00000.png and so on, numbered from `first`.

    Raises UsageError where the folder cannot be made, or holds images already: two walks must not be mixed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder} ({error.strerror}): move away what is there") from error
    if first == 0 and any(folder.iterdir()):
        raise UsageError(f"{folder} holds images already: move it away, or they would be mixed with the new ones")
    for i, image in enumerate(images, first):
        pixels = (image.clamp(-1, 1) * 0.5 + 0.5).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
        write_atomically(folder / f"{i:05}.png", lambda file, pixels=pixels: plt.imsave(file, pixels, format="png"))


def _mosaic(images, columns, gap, frames=None):
    """Images (C, H, W) in [-1, 1] side by side as one, (height, width, 3) in [0, 1], and the upper left corner (x, y)
    of each. frames: a colour for each, of which the inner half of the gap around it is painted.
    """
    H, W = images[0].shape[1:]
    rows = math.ceil(len(images) / columns)
    canvas = np.ones((rows * (H + gap) + gap, columns * (W + gap) + gap, 3))
    corners = [(i % columns * (W + gap) + gap, i // columns * (H + gap) + gap) for i in range(len(images))]
    for i, (image, (x, y)) in enumerate(zip(images, corners, strict=True)):
        if frames:
            edge = gap // 2
            canvas[y - edge : y + H + edge, x - edge : x + W + edge] = frames[i][:3]
        canvas[y : y + H, x : x + W] = (image.clamp(-1, 1) * 0.5 + 0.5).permute(1, 2, 0).numpy()
    return canvas, corners


def draw_idea(path, blocks=4):
    """The README's picture: the noise levels cut into blocks, and a walk from noise to data that passes through them.

    Nothing in it is trained: the data is a mixture of Gaussians, whose denoiser is known.
    """
    noise = LogNormal(sigma_max=20.0)
    partition = make_partition(noise, blocks)
    colours = block_colours(blocks)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    for b, colour in enumerate(colours):
        log_sigma = np.linspace(*map(math.log, partition.interval(b)), 200)
        density = np.exp(-0.5 * ((log_sigma - noise.p_mean) / noise.p_std) ** 2)
        left.fill_between(log_sigma, density, color=colour)
        middle = float(noise.inverse_cdf((blocks - b - 0.5) / blocks))
        height = np.exp(-0.5 * ((math.log(middle) - noise.p_mean) / noise.p_std) ** 2)
        left.text(
            math.log(middle), height / 2, f"block\n{b}", ha="center", va="center", color="white" if b < 3 else "black"
        )
    ticks = [20, 5, 1, 0.3, 0.1, 0.02, 0.002]
    left.set_xticks([math.log(tick) for tick in ticks], ticks)
    left.invert_xaxis()
    left.set_yticks([])
    left.set(
        xlabel="noise level sigma, from pure noise to none",
        title="Each block trains alone, on its own noise levels\n(equal areas: equal shares of the training)",
    )

    corners = [(math.cos(a), math.sin(a)) for a in torch.arange(5) * 2 * math.pi / 5]
    mixture = GaussianMixture(corners, std=0.06)
    z = 20.0 * torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigmas = torch.cat([torch.logspace(math.log10(20), math.log10(0.002), 400, dtype=torch.float64), torch.zeros(1)])
    path_so_far, owner = [z], [0]
    for state, sigma in zip(euler_walk(mixture.denoise, z, sigmas), sigmas, strict=False):
        path_so_far.append(state.z)
        owner.append(partition.route(float(sigma)))
    walk, owner = torch.stack(path_so_far), np.array(owner)  # (steps, 24, 2)
    for b, colour in enumerate(colours):
        own = np.flatnonzero(owner == b)
        span = slice(max(0, own[0] - 1), own[-1] + 1)
        right.plot(walk[span, :, 0], walk[span, :, 1], color=colour, lw=1.2)
    right.plot(*zip(*corners, strict=True), "k*", ms=11, ls="none", label="data")
    right.set(
        xlim=(-3, 3),
        ylim=(-2.2, 2.2),
        aspect="equal",
        title="Run one after the other, they walk from noise to data\n(colour: the block that takes the step)",
    )
    right.legend(loc="upper right")
    save_figure(figure, path)


def save_figure(figure, path):
    write_atomically(Path(path), lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


if __name__ == "__main__":
    parser = Parser(prog="python -m nano_db.plots", description="Draw the README's picture of the method.")
    parser.add_argument("file", help="a PNG to write")
    command(lambda: draw_idea(parser.parse_args().file))
