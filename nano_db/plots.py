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
    _save(figure, Path(folder) / "curves.png")


def draw_comparison(path, names, rows):
    """One small bar chart a column of the table, one bar a run. rows: dictionaries with the same keys."""
    keys = list(rows[0])
    figure, axes = plt.subplots(1, len(keys), figsize=(2.6 * len(keys), 3.2), layout="constrained", squeeze=False)
    for ax, key in zip(axes[0], keys, strict=True):
        bars = ax.bar(range(len(rows)), [row[key] for row in rows], color=block_colours(len(rows)))
        ax.bar_label(bars, fmt="%.4g", fontsize=8)
        ax.set_title(key.replace("_", " "), fontsize=9)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    _save(figure, path)


def draw_by_calls(path, curves, unit):
    """Quality against the number of calls K, a line a run: curves {name: {K: value}}."""
    figure, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for (name, values), colour in zip(curves.items(), block_colours(len(curves)), strict=True):
        ax.plot([int(k) for k in values], list(values.values()), "o-", color=colour, label=name)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="K: calls of the network, or turns of the loop", ylabel=unit)
    ax.legend()
    _save(figure, path)


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
    _save(figure, path)


def _save(figure, path):
    write_atomically(Path(path), lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


if __name__ == "__main__":
    parser = Parser(prog="python -m nano_db.plots", description="Draw the README's picture of the method.")
    parser.add_argument("file", help="a PNG to write")
    command(lambda: draw_idea(parser.parse_args().file))
