"""The course's schematics and its cheat sheet, drawn by code:

    python -m nano_db.laboratory.schematics      # writes docs/pictures/*.svg and docs/cheatsheet.svg

A colour means one thing in all of them: blue the condition x, gold the target y, red the noise (z and sigma), and the
colours from violet to green the blocks, noisiest first. Nothing in the pictures is trained.
"""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from nano_db.heads import log_likelihood, make_codebook
from nano_db.laboratory.mixture import GaussianMixture
from nano_db.laboratory.plots import block_colours, plt
from nano_db.machinery.files import write_atomically
from nano_db.partition import make_partition
from nano_db.sampler import euler_walk
from nano_db.schedule import LogNormal, equal_mass_grid, quantiles

DOCS = Path(__file__).parents[2] / "docs"
X, Y, Z, GREY = "#1971c2", "#e69f00", "#d6336c", "#868e96"  # condition, target, noise; all that is nothing of these


# --- Boxes and arrows, in hundredths of an inch from the lower left corner ---


def canvas(width, height):
    figure = plt.figure(figsize=(width / 100, height / 100))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    return figure, ax


def say(ax, x, y, text, size=9, **style):
    ax.text(x, y, text, **dict(size=size, ha="center", va="center", linespacing=1.35) | style)


def box(ax, x, y, width, height, text, colour, size=10, tint=0.13, dashed=False):
    """A rounded box around (x, y), filled with a tint of the colour of its edge."""
    shape = plt.matplotlib.patches.FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=8",
        facecolor=blend(colour, tint), edgecolor=colour, linewidth=1.5, linestyle="--" if dashed else "-",
    )  # fmt: skip
    ax.add_patch(shape)
    say(ax, x, y, text, size)


def blend(colour, share):
    """The colour on white, `share` of it."""
    return tuple(1 - share + share * c for c in plt.matplotlib.colors.to_rgb(colour))


def arrow(ax, *points, colour="black", style="-", width=1.4):
    """From the first point through the others, with a head at the last."""
    ax.plot(*zip(*points[:-1], strict=True), color=colour, lw=width, ls=style, solid_capstyle="butt")
    how = dict(arrowstyle="-|>", color=colour, lw=width, ls=style, shrinkA=0, shrinkB=0, mutation_scale=12)
    ax.annotate("", points[-1], points[-2], arrowprops=how)


def plus(ax, x, y):
    box(ax, x, y, 24, 24, "+", GREY, 12, tint=0)


# --- The schematics ---


def draw_block():
    """One block of recipe nano: what is noised, trunk, head, likelihood term, loss."""
    figure, ax = canvas(900, 430)
    own = block_colours(4)[1]
    box(ax, 75, 325, 110, 56, "y\nthe class", Y)
    box(ax, 232, 325, 154, 72, "codebook E\na fixed unit vector\na class", GREY)
    box(ax, 505, 325, 150, 56, "z = E[y] + σ ε\nthe noisy target", Z)
    box(ax, 362, 224, 178, 48, "σ of the block's interval\nε standard normal", Z, 9)
    box(ax, 335, 110, 380, 112, "", own, tint=0.05, dashed=True)
    box(ax, 75, 110, 110, 56, "x\nthe condition", X)
    box(ax, 235, 110, 140, 72, "trunk\nL/B layers that\nread x alone", own)
    box(ax, 435, 110, 140, 72, "head\na small MLP that\nsees h, z and σ", own)
    box(ax, 645, 224, 144, 56, "likelihood term\n⟨z, E⟩ / σ²", Z)
    box(ax, 805, 110, 150, 56, "softmax\np(y | z, x)", GREY)
    box(ax, 805, 325, 150, 56, "loss of the block\n− ln p(y | z, x)", Y)
    plus(ax, 362, 325)
    plus(ax, 645, 110)
    arrow(ax, (75, 353), (75, 400), (805, 400), (805, 353), colour=Y)
    for start, end in ((130, 155), (309, 350), (374, 430)):
        arrow(ax, (start, 325), (end, 325))
    arrow(ax, (130, 110), (165, 110), colour=X)
    for start, end in ((305, 365), (505, 633), (657, 730)):
        arrow(ax, (start, 110), (end, 110))
    arrow(ax, (362, 248), (362, 313), colour=Z)
    arrow(ax, (474, 297), (474, 146), colour=Z)
    arrow(ax, (550, 297), (550, 224), (573, 224), colour=Z)
    arrow(ax, (645, 196), (645, 122), colour=Z)
    arrow(ax, (805, 138), (805, 297))
    say(ax, 440, 413, "the right answer", color=Y)
    say(ax, 327, 339, "E[y]")
    say(ax, 335, 122, "h")
    say(ax, 579, 122, "≈ ln p(y | x)")
    say(ax, 694, 122, "logits")
    say(ax, 496, 196, "z, σ", color=Z)
    say(ax, 805, 55, "for the walk:\nD = Σ p(y | z, x) E[y]")
    say(ax, 335, 28, "All that is trained, and all that is in memory: one block.", color=own)
    return figure


def draw_networks():
    """The five architectures, bottom to top, with the place at which noise enters; as in train_*.py, recipe nano."""
    figure, ax = canvas(900, 540)
    own, core = block_colours(4)[1], "core, looped"
    z, sigma, label, time = ("z, σ", Z), ("σ", Z), ("x", X), ("t", Z)  # what enters from the side
    everywhere = [(270, 134, "L/B layers,\nlooking\neverywhere")]
    loop = [(216, 36, "prelude"), (270, 40, core), (324, 36, "coda")]
    columns = [
        ("GPT", ("x: the text so far", X), [(270, 134, "L/B layers,\nlooking back")], "denoising head", "p(next token)",
         {400: z}, "Noise enters at the head.\nThe layers read x alone,\nand run once a token."),
        ("ViT", ("x: an image", X), everywhere, "denoising head", "p(label)",
         {400: z}, "Noise enters at the head.\nThe layers read x alone,\nand run once an image."),
        ("DiT", ("z: a noisy image", Z), everywhere, "EDM head", "D: the image",
         {400: z, 290: sigma, 250: label}, "z is what is read.\nσ and the class x modulate\neach layer, at each call."),
        ("masked diffusion", ("z: text with gaps", Z), everywhere, "readout", "p(hidden letters)",
         {270: time}, "Noise hides letters: z is\nthe text itself. The time t\nmodulates each layer."),
        ("looped", ("x: the text so far", X), loop, "posterior head", "p(next token)",
         {400: z, 270: z}, "z takes the place of the\nstate. One block serves\nall noise levels."),
    ]  # fmt: skip
    for i, (name, given, parts, head, answer, enters, words) in enumerate(columns):
        middle = 112 + 176 * i
        say(ax, middle, 520, name, 12, weight="bold")
        stack = [(140, 40, *given), *((*part, own) for part in parts), (400, 40, head, own), (470, 40, answer, Y)]
        for y, height, text, colour in stack:
            box(ax, middle, y, 126, height, text, colour, 9)
        for (y, height, *_), (above, height_above, *_) in pairwise(stack):
            arrow(ax, (middle, y + height / 2), (middle, above - height_above / 2))
        for y, (text, colour) in enters.items():
            box(ax, middle - 88, y, 34, 28, text, colour, 9)
            arrow(ax, (middle - 71, y), (middle - 63, y), colour=colour)
        say(ax, middle - 14, 80, words, 8.5)
    legend = ((220, "red: where noise enters", Z), (465, "blue: the condition", X), (680, "gold: the answer", Y))
    for x, text, colour in legend:
        say(ax, x, 22, text, 10, color=colour, weight="bold")
    return figure


def draw_gradients():
    """Where gradients flow, and what is in memory: end to end, and in blocks."""
    figure, ax = canvas(900, 470)
    edges, colours, rows = quantiles(LogNormal(0.3, 0.8, 0.05, 20.0), 4), block_colours(4), (140, 212, 284, 356)
    say(ax, 130, 448, "end to end", 12, weight="bold")
    say(ax, 580, 448, "in blocks: here block 1 is in training", 12, weight="bold")
    box(ax, 130, 248, 190, 282, "", "black", tint=0.04, dashed=True)
    box(ax, 566, rows[1], 190, 66, "", "black", tint=0.04, dashed=True)
    stack = [(68, "x: the condition", X), *((y, f"layers {2 * k + 1} and {2 * k + 2}", GREY) for k, y in enumerate(rows))]
    stack.append((418, "loss", Y))
    for y, text, colour in stack:
        box(ax, 130, y, 150, 34, text, colour)
    for (y, *_), (above, *_) in pairwise(stack):
        arrow(ax, (105, y + 17), (105, above - 17), colour=GREY)
        if y > 68:
            arrow(ax, (155, above - 17), (155, y + 17), style=(0, (3, 2)))
    for b, (y, colour) in enumerate(zip(rows, colours, strict=True)):
        trains = b == 1
        box(ax, 372, y, 160, 44, f"x, and z with σ from\n{edges[b]:.2g} to {edges[b + 1]:.2g}", Z, 9)
        box(ax, 566, y, 150, 44, f"block {b}\nlayers {2 * b + 1} and {2 * b + 2}", colour, 9, 0.3 if trains else 0.1)
        box(ax, 732, y, 80, 34, f"loss {b}", Y)
        arrow(ax, (452, y), (491, y), colour=GREY)
        arrow(ax, (641, y + 8), (692, y + 8), colour=GREY)
        arrow(ax, (692, y - 8), (641, y - 8), style=(0, (3, 2)))
        say(ax, 838, y, "in memory" if trains else "in its file", 9, color="black" if trains else GREY)
    arrow(ax, (292, 68), (332, 68), colour=GREY)
    arrow(ax, (452, 68), (412, 68), style=(0, (3, 2)))
    box(ax, 592, 68, 40, 26, "", "black", tint=0.04, dashed=True)
    for x, text in ((342, "forward"), (462, "gradient"), (622, "weights, gradients, AdamW's averages\nand activations in memory")):
        say(ax, x, 68, text, ha="left")
    say(ax, 566, 22, "No arrow leads from one block to another.", 10)
    return figure


def draw_walk():
    """Walks of a number from noise to data, by the exact denoiser; the density that they follow, in grey."""
    noise, blocks, spread = LogNormal(sigma_max=20.0), 4, 0.9
    data = GaussianMixture([[-1.1], [0.0], [1.1]], std=0.05)
    partition, colours = make_partition(noise, blocks), block_colours(blocks)

    def shares(sigmas):  # how far along the axis: a block is as wide as its share of the training
        return blocks * (1 - noise.cdf(sigmas.clamp(noise.sigma_min)))

    def scales(sigmas):  # the spread of z, to divide by
        return (sigmas**2 + spread**2).sqrt()[:, None]

    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    levels, heights = quantiles(noise, 48), torch.linspace(-2.2, 2.2, 67, dtype=torch.float64)
    rows = zip(levels.tolist(), scales(levels)[:, 0], strict=True)
    density = torch.stack([scale * data.log_density(heights[:, None] * scale, s).exp() for s, scale in rows], 1)
    ax.contourf(shares(levels), heights, density, np.linspace(0.05, 0.8, 6), cmap="Greys", alpha=0.4, extend="max")
    sigmas = torch.cat([quantiles(noise, 160), torch.zeros(1, dtype=torch.float64)])
    z = 20.0 * torch.linspace(-1.9, 1.9, 14, dtype=torch.float64)[:, None]
    walks = torch.stack([z, *(state.z for state in euler_walk(data.denoise, z, sigmas))])[..., 0] / scales(sigmas)
    for b, colour in enumerate(colours):
        mine = slice(40 * b, 40 * (b + 1) + 1 + (b == blocks - 1))
        ax.plot(shares(sigmas[mine]), walks[mine], color=colour, lw=1.6)
        ax.text(b + 0.5, 2.3, f"block {b}", ha="center", color=colour, weight="bold")
    few, one = equal_mass_grid(noise, 2 * blocks), z[3:4]
    calls = torch.stack([one, *(state.z for state in euler_walk(data.denoise, one, few))])[:, 0] / scales(few)
    ax.plot(shares(few), calls, "o--", color=Z, ms=5, lw=1.2, label="the same in 8 calls, 2 of each block")
    ax.set(xlim=(-0.02, blocks + 0.02), ylim=(-2.2, 2.2), yticks=[], ylabel="z, over its standard deviation")
    ax.set_xticks(range(blocks + 1), [f"{edge:.2g}" for edge in partition.edges])
    ax.set_xlabel("noise level σ (a block is as wide as its share of the training)")
    ax.legend(loc="upper right")
    return figure


def label_walks(blocks=3, calls=60):
    """Class names, and the exact p(y | z, x) at each call (calls, 3, V): of two walks from noise, and of one from 0."""
    names, prior = ["cat", "dog", "fox", "owl", "bee"], torch.tensor([0.42, 0.27, 0.16, 0.1, 0.05])
    codebook, found = make_codebook(len(names), 16), []
    sigmas = [*quantiles(LogNormal(1.0, 0.8, 0.2, 20.0), calls - 1).tolist(), 0.0]  # the last call is at sigma_min

    def denoise(z, sigma):
        found.append((prior.log() + log_likelihood(z, sigma, codebook)).softmax(-1))
        return found[-1] @ codebook

    z = 20.0 * torch.randn(2, 16, generator=torch.Generator().manual_seed(28))
    list(euler_walk(denoise, torch.cat([z, torch.zeros(1, 16)]), sigmas))
    return names, torch.stack(found)


def draw_label(blocks=3):
    """What a walk does to the probabilities of a label."""
    names, p = label_walks()
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), layout="constrained", sharey=True)
    calls = np.linspace(0, blocks, len(p))
    for k, (ax, start) in enumerate(zip(axes, ("noise", "other noise", "z = 0"), strict=True)):
        ax.stackplot(calls, p[:, k].T, colors=plt.get_cmap("Set2").colors, edgecolor="white", lw=0.8)
        for name, top, share in zip(names, p[0, k].cumsum(0), p[0, k], strict=True):
            ax.text(0.08, top - share / 2, name, va="center", size=9)
        for b, colour in enumerate(block_colours(blocks)):
            ax.plot([b + 0.02, b + 0.98], [-0.035] * 2, color=colour, lw=5, clip_on=False, solid_capstyle="butt")
            ax.text(b + 0.5, -0.065, f"block {b}", ha="center", va="top", color=colour, size=9)
        ax.set_title(f"from {start}: it ends at {names[p[-1, k].argmax()]}", size=11)
        ax.set(xlim=(0, blocks), ylim=(0, 1), xticks=[])
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("p(y | z, x)")
    figure.supxlabel("calls of the walk, noisiest first", size=10)
    return figure


PICTURES = {"block": draw_block, "networks": draw_networks, "gradients": draw_gradients, "walk": draw_walk, "label": draw_label}


def save(figure, path):
    with plt.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        write_atomically(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}))
    plt.close(figure)


def draw_all(folder=DOCS):
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        save(draw(), folder / "pictures" / f"{name}.svg")


if __name__ == "__main__":
    draw_all()
