"""Pictures of what was measured, and the README's of the method: draw_idea("notebooks/blocks.png")."""

import math

import numpy as np
import torch

from experiments.mixture import GaussianMixture
from nano_db.partition import make_partition
from nano_db.sampler import euler_walk
from nano_db.schedule import LogNormal
from nano_db.trainer.plots import block_colours, plt, save_figure


def draw_depth(path, panels):
    """depth.png of results: quality against the layers of a network or of a block, one panel per table.

    panels: {(title, unit): {label: {layers: one number per seed}}}
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), layout="constrained", squeeze=False)
    for ax, ((title, unit), lines) in zip(axes[0], panels.items(), strict=True):
        for style, (label, seeds) in zip(("o--", "s-", "^:")[: len(lines)], lines.items(), strict=True):
            means, spreads = [np.mean(v) for v in seeds.values()], [np.std(v, ddof=len(v) > 1) for v in seeds.values()]
            ax.errorbar(list(seeds), means, spreads, fmt=style, capsize=3, label=label)
        ticks = sorted({layers for seeds in lines.values() for layers in seeds})
        ax.set(xscale="log", xlabel="layers of the network, or of a block", ylabel=unit, title=title)
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.legend()
    save_figure(figure, path)


METHODS = {  # of equal_memory.png: marker and colour
    "end to end": ("s", "black"), "blocks": ("o", "tab:blue"), "one shallow network": ("^", "tab:orange"),
    "mean of B such": ("v", "tab:green"),
}  # fmt: skip


def draw_equal_memory(path, panels):
    """equal_memory.png of results: quality against training memory, one panel per architecture. Up and left wins.

    panels: {(title, unit): {one of METHODS: (MiB, MiB with checkpointed activations, one number per seed)}}. A line
    joins the two, for checkpointing changes no weight; what is hollow is checkpointed. Small dots are seeds.
    """
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for ax, ((title, unit), methods) in zip(axes.flat, panels.items(), strict=False):
        for label, (plain, saving, numbers) in methods.items():
            marker, colour = METHODS[label]
            mean = np.mean(numbers)
            ax.plot([saving, plain], [mean, mean], color=colour, lw=1, alpha=0.5)
            for memory, face in ((plain, colour), (saving, "white")):
                ax.plot([memory] * len(numbers), numbers, ".", color=colour, ms=4, alpha=0.5)
                ax.plot(memory, mean, marker, color=colour, mfc=face, ms=9)
        ax.set(xscale="log", title=title, xlabel="training memory (MiB)", ylabel=unit)
        if "lower" in unit:
            ax.invert_yaxis()  # up is better in every panel
        memories = [memory for plain, saving, _ in methods.values() for memory in (plain, saving)]
        ticks = [t for t in (5, 10, 20, 50, 100, 200, 500, 1000) if min(memories) / 1.5 < t < max(memories) * 1.5]
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.margins(0.15)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    marks = [plt.Line2D([], [], ls="", marker=marker, color=colour, ms=9) for marker, colour in METHODS.values()]
    hollow = plt.Line2D([], [], ls="", marker="o", color="grey", mfc="white", ms=9)
    names = [*METHODS, "hollow: with checkpointed activations"]
    axes.flat[-1].legend([*marks, hollow], names, loc="center", frameon=False, title="up and left is better")
    save_figure(figure, path)


def draw_idea(path, blocks=4):
    """The README's picture: noise levels cut into blocks, and walks through them. Nothing is trained: D is exact."""
    noise = LogNormal(sigma_max=20.0)
    partition, colours = make_partition(noise, blocks), block_colours(blocks)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    def density(log_sigma):
        return np.exp(-0.5 * ((log_sigma - noise.p_mean) / noise.p_std) ** 2)

    for b, colour in enumerate(colours):
        log_sigma = np.linspace(*np.log(partition.interval(b)), 200)
        left.fill_between(log_sigma, density(log_sigma), color=colour)
        middle = math.log(noise.inverse_cdf((blocks - b - 0.5) / blocks))
        left.text(middle, density(middle) / 2, f"block\n{b}", ha="center", va="center", color="white")
    ticks = [20, 5, 1, 0.3, 0.1, 0.02, 0.002]
    left.set_xticks(np.log(ticks), ticks)
    left.set(xlabel="noise level sigma, from pure noise to none", yticks=[], xlim=left.get_xlim()[::-1])
    left.set_title("Each block trains alone, on its own noise levels\n(equal areas: equal shares of the training)")

    corners = [(math.cos(a), math.sin(a)) for a in torch.arange(5) * 2 * math.pi / 5]
    z = 20.0 * torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigmas = torch.tensor([*np.geomspace(20, 0.002, 400), 0.0])
    states = euler_walk(GaussianMixture(corners, std=0.06).denoise, z, sigmas)
    walk = torch.stack([z, *(state.z for state in states)])  # (steps + 1, 24, 2)
    for b, colour in enumerate(colours):
        steps = (partition.route(sigmas[:-1]) == b).nonzero()
        span = walk[steps.min() : steps.max() + 2]
        right.plot(span[..., 0], span[..., 1], color=colour, lw=1.2)
    right.plot(*zip(*corners, strict=True), "k*", ms=11, ls="none", label="data")
    right.set(xlim=(-3, 3), ylim=(-2.2, 2.2), aspect="equal")
    right.set_title("Run one after the other, they walk from noise to data\n(colour: the block that takes the step)")
    right.legend(loc="upper right")
    save_figure(figure, path)
