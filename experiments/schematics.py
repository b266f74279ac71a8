"""The course's schematics and its cheat sheet, drawn by code:

    python -m experiments.schematics      # writes docs/pictures/*.svg and docs/cheatsheet.svg

A colour means one thing in all of them: blue the condition x, gold the target y, red the noise (z and sigma), and the
colours from violet to green the blocks, noisiest first. Nothing in the pictures is trained: the denoisers are exact.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch

import train_gpt
import train_vit
from experiments.mixture import GaussianMixture
from nano_db.heads import log_likelihood, make_target_embeddings
from nano_db.partition import make_partition
from nano_db.sampler import euler_walk
from nano_db.schedule import LogNormal, equal_probability_grid, quantiles
from nano_db.trainer.checkpoints import make_folder
from nano_db.trainer.command import command
from nano_db.trainer.plots import block_colours, plt
from nano_db.trainer.settings import Parser

DOCS = Path(__file__).parents[1] / "docs"
X, Y, Z, GREY = "#1971c2", "#e69f00", "#d6336c", "#868e96"  # condition, target, noise; everything else
DASHED = (0, (3, 2))
LABEL_NOISE, TOKEN_NOISE = train_vit.NOISE["nano"], train_gpt.NOISE["nano"]

# Boxes and arrows. Lengths are in hundredths of an inch, from the lower left corner of the picture.


def canvas(width, height):
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    return figure, ax


def say(ax, x, y, text, size=9, **style):
    ax.text(x, y, text, **dict(size=size, ha="center", va="center", linespacing=1.35) | style)


def box(ax, x, y, width, height, text, colour, size=10, tint=0.13, style="-"):
    """A rounded box around (x, y), filled with `tint` of the colour of its edge."""
    fill, corner = [1 - tint + tint * c for c in to_rgb(colour)], (x - width / 2, y - height / 2)
    look = dict(facecolor=fill, edgecolor=colour, linewidth=1.5, linestyle=style)
    ax.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=8", **look))
    say(ax, x, y, text, size)


def arrow(ax, *points, colour="black", style="-"):
    """An arrow from the first point through the others, with its head at the last."""
    ax.plot(*zip(*points[:-1], strict=True), color=colour, lw=1.4, ls=style, solid_capstyle="butt")
    how = dict(arrowstyle="-|>", color=colour, lw=1.4, ls=style, shrinkA=0, shrinkB=0, mutation_scale=12)
    ax.annotate("", points[-1], points[-2], arrowprops=how)


def draw_block():
    """One block of recipe nano: what is noised, trunk, head, likelihood term, loss."""
    figure, ax = canvas(900, 430)
    own = block_colours(4)[1]
    box(ax, 335, 110, 380, 112, "", own, tint=0.05, style="--")
    for x, y, width, height, text, colour in (
        (75, 325, 110, 56, "y\nthe class", Y),
        (232, 325, 154, 72, "target embeddings E\none fixed unit vector\nper class", GREY),
        (362, 325, 24, 24, "+", GREY),
        (505, 325, 150, 56, "z = E[y] + σ ε\nthe noisy target", Z),
        (805, 325, 150, 56, "loss of the block\n− ln p(y | z, x)", Y),
        (362, 224, 196, 48, "σ of the block's interval\nε standard normal", Z),
        (645, 224, 144, 56, "likelihood term\n⟨z, E⟩ / σ²", Z),
        (75, 110, 110, 56, "x\nthe condition", X),
        (235, 110, 140, 72, "trunk\nL/B layers that\nread only x", own),
        (435, 110, 140, 72, "head\na small MLP that\nsees h, z and σ", own),
        (645, 110, 24, 24, "+", GREY),
        (805, 110, 150, 56, "softmax\np(y | z, x)", GREY),
    ):
        box(ax, x, y, width, height, text, colour)
    arrow(ax, (75, 353), (75, 400), (805, 400), (805, 353), colour=Y)
    for y, spans in ((325, ((130, 155), (309, 350), (374, 430))), (110, ((305, 365), (505, 633), (657, 730)))):
        for start, end in spans:
            arrow(ax, (start, y), (end, y))
    arrow(ax, (130, 110), (165, 110), colour=X)
    arrow(ax, (362, 248), (362, 313), colour=Z)
    arrow(ax, (480, 297), (480, 146), colour=Z)
    arrow(ax, (550, 297), (550, 212), (573, 212), colour=Z)
    arrow(ax, (460, 236), (573, 236), colour=Z)
    arrow(ax, (645, 196), (645, 122), colour=Z)
    arrow(ax, (805, 138), (805, 297))
    for x, y, text in ((327, 339, "E[y]"), (335, 122, "h"), (579, 122, "≈ ln p(y | x)"), (694, 122, "logits")):
        say(ax, x, y, text)
    say(ax, 440, 413, "the right answer", color=Y)
    say(ax, 502, 190, "z, σ", color=Z)
    say(ax, 524, 246, "σ", color=Z)
    say(ax, 540, 266, "z", color=Z)
    say(ax, 805, 55, "for the walk:\nD = Σ p(y | z, x) E[y]")
    say(ax, 335, 28, "All that is trained, and all that is in memory: one block.", color=own)
    return figure


def draw_networks():
    """The five architectures, bottom to top, and where noise enters them: as in train_*.py, recipe nano."""
    figure, ax = canvas(900, 540)
    own = block_colours(4)[1]
    back = [(270, 134, "L/B layers,\ncausal\nattention")]  # (height of the middle, height, text)
    around = [(270, 134, "L/B layers,\nbidirectional\nattention")]
    loop = [(216, 36, "prelude"), (270, 40, "core, looped"), (324, 36, "coda")]
    z, sigma, label, share = ("z, σ", Z), ("σ", Z), ("x", X), ("α", Z)  # what enters from the side, by height
    for i, (name, given, layers, head, answer, enters, words) in enumerate((
        ("GPT", ("x: the text so far", X), back, "denoising head", "p(next token)", {400: z},
         "Noise enters at the head.\nThe layers read only x,\nand run once per token."),
        ("ViT", ("x: an image", X), around, "denoising head", "p(label)", {400: z},
         "Noise enters at the head.\nThe layers read only x,\nand run once per image."),
        ("DiT", ("z: a noisy image", Z), around, "EDM head", "D: the image", {400: z, 290: sigma, 250: label},
         "The layers read z.\nσ and the class x modulate\nthem, at each step."),
        ("masked diffusion", ("z: masked text", Z), around, "lm_head", "p(masked letters)", {270: share},
         "Noise masks letters: z is\nthe text itself. The unmasked\nshare α modulates the layers."),
        ("looped", ("x: the text so far", X), loop, "posterior head", "p(next token)", {400: z, 270: z},
         "z takes the place of the\nstate. One block serves\nall noise levels."),
    )):  # fmt: skip
        middle = 112 + 176 * i
        say(ax, middle, 520, name, 12, weight="bold")
        stack = [(140, 40, *given), *((*part, own) for part in layers), (400, 40, head, own), (470, 40, answer, Y)]
        for y, height, text, colour in stack:
            box(ax, middle, y, 122, height, text, colour, 9)
        for (y, height, *_), (above, height_above, *_) in pairwise(stack):
            arrow(ax, (middle, y + height / 2), (middle, above - height_above / 2))
        for y, (text, colour) in enters.items():
            box(ax, middle - 90, y, 34, 28, text, colour, 9)
            arrow(ax, (middle - 73, y), (middle - 61, y), colour=colour)
        say(ax, middle - 14, 80, words, 8.5)
    for x, text, colour in ((220, "red: noise", Z), (450, "blue: the condition", X), (680, "gold: the answer", Y)):
        say(ax, x, 22, text, 10, color=colour, weight="bold")
    return figure


def draw_gradients():
    """Where gradients flow, and what is in memory: end to end, and in blocks."""
    figure, ax = canvas(900, 480)
    edges, rows = quantiles(TOKEN_NOISE, 4), (140, 212, 284, 356)
    box(ax, 130, 248, 190, 282, "", "black", tint=0.04, style="--")
    box(ax, 566, rows[1], 190, 66, "", "black", tint=0.04, style="--")
    say(ax, 130, 460, "end to end", 12, weight="bold")
    say(ax, 566, 460, "in blocks: here block 1 trains", 12, weight="bold")
    layers = [f"layers {2 * b + 1} and {2 * b + 2}" for b in range(4)]
    stack = [(68, "x: the text so far", X), *((y, text, GREY) for y, text in zip(rows, layers, strict=True))]
    for y, text, colour in (*stack, (420, "loss", Y)):
        box(ax, 130, y, 150, 34, text, colour)
    for y, above in pairwise((68, *rows, 420)):
        arrow(ax, (105, y + 17), (105, above - 17), colour=GREY)
        if y > 68:
            arrow(ax, (155, above - 17), (155, y + 17), style=DASHED)
    for b, (y, colour) in enumerate(zip(rows, block_colours(4), strict=True)):
        trains = b == 1
        box(ax, 372, y, 160, 44, f"x, and z with σ from\n{edges[b]:.2g} to {edges[b + 1]:.2g}", Z, 9)
        box(ax, 566, y, 150, 44, f"block {b}:\n{layers[b]}, a head", colour, 9, 0.3 if trains else 0.1)
        box(ax, 732, y, 80, 34, f"loss {b}", Y)
        arrow(ax, (452, y), (491, y), colour=GREY)
        arrow(ax, (641, y + 8), (692, y + 8), colour=GREY)
        arrow(ax, (692, y - 8), (641, y - 8), style=DASHED)
        say(ax, 838, y, "in memory" if trains else "on disk", color="black" if trains else GREY)
    arrow(ax, (292, 68), (332, 68), colour=GREY)
    arrow(ax, (452, 68), (412, 68), style=DASHED)
    box(ax, 592, 68, 40, 26, "", "black", tint=0.04, style="--")
    say(ax, 342, 68, "forward", ha="left")
    say(ax, 462, 68, "gradient", ha="left")
    say(ax, 622, 68, "in memory: weights, gradients,\nAdamW's state, activations", ha="left")
    say(ax, 566, 22, "No arrow leads from one block to another.", 10)
    return figure


def draw_levels(blocks=4):
    """The README's picture of the idea: noise levels of train_gpt.py cut into blocks, and walks through them."""
    noise, colours = TOKEN_NOISE, block_colours(blocks)
    partition = make_partition(noise, blocks)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    for b, colour in enumerate(colours):
        log_sigma = np.linspace(*np.log(partition.interval(b)), 120)
        density = np.exp(-0.5 * ((log_sigma - noise.p_mean) / noise.p_std) ** 2) / noise.p_std / np.sqrt(2 * np.pi)
        left.fill_between(log_sigma, density, color=colour, lw=0)
        middle = np.log(float(noise.inverse_cdf((blocks - b - 0.5) / blocks)))
        left.text(middle, 0.13, f"{b}", ha="center", va="center", color="white", size=13, weight="bold")
    left.text(np.log(9), 0.13, "block", ha="center", va="center", size=11)
    ticks = sorted([*partition.edges, 5, 0.2], reverse=True)
    left.set_xticks(np.log(ticks), [f"{tick:.2g}" for tick in ticks])
    left.set(xlabel="noise level σ, from pure noise to none", ylabel="density, per unit of ln σ")
    left.set(xlim=np.log([20, 0.05]), ylim=(0, 0.52), yticks=[0, 0.2, 0.4])
    title = "The GPT's blocks: each has its own noise levels\n(equal areas: equal shares of the training)"
    left.set_title(title, size=11)

    angles = np.arange(5) * 2 * np.pi / 5
    corners = np.stack([np.cos(angles), np.sin(angles)], 1)
    z = 20.0 * torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigmas = torch.tensor([*np.geomspace(20, 0.05, 400), 0.0])
    states = euler_walk(GaussianMixture(corners.tolist(), std=0.06).denoise, z, sigmas)
    walk = torch.stack([z, *(state.z for state in states)])  # (steps + 1, 24, 2)
    for b, colour in enumerate(colours):
        steps = (partition.route(sigmas[:-1]) == b).nonzero()
        span = walk[steps.min() : steps.max() + 2]
        right.plot(span[..., 0], span[..., 1], color=colour, lw=1.2)
    right.plot(*corners.T, "k*", ms=11, ls="none", label="data")
    right.set(
        xlim=(-5, 5), ylim=(-3.6, 3.6), aspect="equal", xlabel="first coordinate of z", ylabel="second coordinate of z"
    )
    title = "Toy data (five points): walks to the mean, then\nto a point (colour: the block that takes the step)"
    right.set_title(title, size=11)
    right.set(xticks=range(-4, 5, 2), yticks=range(-2, 3, 2))
    right.legend(loc="upper right")
    return figure


def draw_walk(blocks=4):
    """A single number walks from noise to data with the exact denoiser; the density of z is grey."""
    noise, data, spread = LogNormal(sigma_max=20.0), GaussianMixture([[-1.1], [0.0], [1.1]], std=0.05), 0.9
    partition = make_partition(noise, blocks)

    def shares(sigmas):  # how far along the axis: a block is as wide as its share of the training
        return blocks * (1 - noise.cdf(sigmas.clamp(noise.sigma_min)))

    def walks(z, sigmas):  # over the standard deviation of z
        states = torch.stack([z, *(state.z for state in euler_walk(data.denoise, z, sigmas))])
        return states[..., 0] / (sigmas**2 + spread**2).sqrt()[:, None]

    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    levels, heights = quantiles(noise, 48), torch.linspace(-2.2, 2.2, 67, dtype=torch.float64)
    scales = (levels**2 + spread**2).sqrt()
    rows = [s * data.log_density(heights[:, None] * s, sigma).exp() for s, sigma in zip(scales, levels, strict=True)]
    steps = np.linspace(0.05, 0.8, 6)
    ax.contourf(shares(levels), heights, torch.stack(rows, 1), steps, cmap="Greys", alpha=0.4, extend="max")
    z = 20.0 * torch.linspace(-1.9, 1.9, 14, dtype=torch.float64)[:, None]
    fine, few = equal_probability_grid(noise, 600 * blocks), equal_probability_grid(noise, 2 * blocks)
    many = walks(z, fine)
    for b, colour in enumerate(block_colours(blocks)):
        mine = slice(600 * b, 600 * (b + 1) + 1)
        label = "14 walks in 2,400 sampling steps" if b == 0 else None
        ax.plot(shares(fine[mine]), many[mine], color=colour, lw=1.6, label=[label, *[None] * 13])
        ax.text(b + 0.5, 2.3, f"block {b}", ha="center", color=colour, weight="bold")
    ax.plot(shares(few), walks(z[3:4], few), "ko--", ms=5, lw=1.2, label="one of them in 8 sampling steps, 2 per block")
    ax.set(xlim=(-0.02, blocks + 0.02), ylim=(-2.2, 2.2), yticks=[], ylabel="z, over its standard deviation")
    ax.set_xticks(range(blocks + 1), [f"{edge:.2g}" for edge in partition.edges])
    ax.set_xlabel("noise level σ (a block is as wide as its share of the training; grey: how dense z is)")
    ax.legend(loc="upper right")
    return figure


def label_walks(steps=60):
    """Class names, and the exact p(y | z, x) at each step, (steps, 3, V): two walks from noise, and one from 0."""
    names, prior = ["cat", "dog", "fox", "owl", "bee"], torch.tensor([0.42, 0.27, 0.16, 0.1, 0.05])  # p(y | x)
    target_embeddings, found = make_target_embeddings(len(names), 16), []
    sigmas = [*quantiles(LABEL_NOISE, steps - 1).tolist(), 0.0]  # the last step begins at sigma_min

    def denoise(z, sigma):
        found.append((prior.log() + log_likelihood(z, sigma, target_embeddings)).softmax(-1))
        return found[-1] @ target_embeddings

    z = 20.0 * torch.randn(2, 16, generator=torch.Generator().manual_seed(28))
    list(euler_walk(denoise, torch.cat([z, torch.zeros(1, 16)]), sigmas))
    return names, torch.stack(found)


def draw_label(blocks=3):
    """What a walk does to the probabilities of a label."""
    names, p = label_walks()
    edges = [f"{edge:.2g}" for edge in quantiles(LABEL_NOISE, blocks).tolist()]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), layout="constrained", sharey=True)
    for k, (ax, start) in enumerate(zip(axes, ("noise", "other noise", "z = 0"), strict=True)):
        colours = plt.get_cmap("Set2").colors
        ax.stackplot(np.linspace(0, blocks, len(p)), p[:, k].T, colors=colours, edgecolor="white", lw=0.8)
        for name, top, share in zip(names, p[0, k].cumsum(0), p[0, k], strict=True):
            ax.text(0.08, top - share / 2, name, va="center", size=9)
        for b, colour in enumerate(block_colours(blocks)):
            ax.plot([b + 0.02, b + 0.98], [-0.035] * 2, color=colour, lw=5, clip_on=False, solid_capstyle="butt")
            ax.text(b + 0.5, -0.065, f"block {b}", ha="center", va="top", color=colour, size=9)
        ax.set_title(f"from {start}: it ends at {names[p[-1, k].argmax()]}", size=11)
        ax.set(xlim=(0, blocks), ylim=(0, 1))
        ax.set_xticks(range(blocks + 1), edges, size=9)
        ax.tick_params(axis="x", length=0, pad=24)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("p(y | z, x)")
    figure.supxlabel("noise level σ of the sampling step", size=10)
    return figure


def draw_cheatsheet(columns=3, margin=28, top=754):
    """docs/cheatsheet.md on a landscape A4 page: each line of the file is a line of the page."""
    figure, ax = canvas(1169, 827)
    own, width, renderer = (
        block_colours(4)[1],
        (1169 - 2 * margin - 16 * (columns - 1)) / columns,
        figure.canvas.get_renderer(),
    )
    title, *sections = (DOCS / "cheatsheet.md").read_text(encoding="utf-8").removeprefix("# ").split("\n## ")
    say(ax, margin, 795, title.strip(), 19, ha="left", weight="bold")
    chain = ((500, 30, "x", X), (572, 62, "trunk", own), (664, 62, "head", own), (762, 82, "p(y | z, x)", Y))
    for x, length, text, colour in chain:
        box(ax, x, 785, length, 24, text, colour, 9)
    for (x, length, *_), (after, wide, *_) in pairwise(chain):
        arrow(ax, (x + length / 2, 785), (after - wide / 2, 785))
    arrow(ax, (664, 815), (664, 797), colour=Z)
    say(ax, 686, 810, "z, σ", color=Z)
    say(ax, 935, 812, "noise levels, cut into blocks", ha="right")
    noise = LogNormal(sigma_max=20.0)
    for b, colour in enumerate(block_colours(4)):
        log_sigma = np.linspace(*np.log(make_partition(noise, 4).interval(b)), 60)
        density = 44 * np.exp(-0.5 * ((log_sigma - noise.p_mean) / noise.p_std) ** 2)
        ax.fill_between(940 - 32 * log_sigma, 772, 772 + density, color=colour, lw=0)

    panels = []  # (height, colour, [(text, its height), ...])
    for section, colour in zip(sections, block_colours(len(sections)), strict=True):
        heading, *lines = filter(None, section.split("\n"))
        texts = [ax.text(0, 0, heading, va="top", size=11, color=colour, weight="bold")]
        for line in lines:
            size, line = 11.5 if line.startswith("$$") else 9.4, line.replace("$$", "$").removeprefix("- ")
            texts.append(ax.text(0, 0, line, va="top", size=size))
        heights = [text.get_window_extent(renderer).height + 6 for text in texts]
        panels.append((sum(heights) + 14, colour, [*zip(texts, heights, strict=True)]))
    total, above, stacks = sum(height for height, *_ in panels), 0, [[] for _ in range(columns)]
    for panel in panels:  # into the column in which its middle would be if all were one long strip
        stacks[int(columns * (above + panel[0] / 2) / total)].append(panel)
        above += panel[0]
    for column, stack in enumerate(stacks):
        gap = (top - margin - sum(height for height, *_ in stack)) / (len(stack) - 1)
        left, y = margin + column * (width + 16), top
        for height, colour, texts in stack:
            box(ax, left + width / 2, y - height / 2, width, height, "", colour, tint=0.05)
            below = y - 10
            for text, used in texts:
                text.set_position((left + 12, below))
                below -= used
            y -= height + gap
    return figure


PICTURES = {
    "pictures/levels.svg": draw_levels,
    "pictures/block.svg": draw_block,
    "pictures/networks.svg": draw_networks,
    "pictures/gradients.svg": draw_gradients,
    "pictures/walk.svg": draw_walk,
    "pictures/label.svg": draw_label,
    "cheatsheet.svg": draw_cheatsheet,
}


def draw_all(folder=DOCS):
    """Write all pictures, the same bytes each time. Their text stays text; the cheat sheet's formulas become shapes."""
    make_folder(folder / "pictures")
    for name, draw in PICTURES.items():
        figure, as_text = draw(), "path" if name == "cheatsheet.svg" else "none"
        with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": as_text}):
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main():
    parser = Parser(prog="python -m experiments.schematics", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=DOCS, help="output folder (default docs)")
    out = parser.parse_args().out
    draw_all(out)
    print(f"written: {', '.join(str(out / name) for name in PICTURES)}")


if __name__ == "__main__":
    command(main)
