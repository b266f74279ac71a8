"""Pictures of what was measured."""

import numpy as np

from nano_db.trainer.plots import plt, save_figure


def draw_depth(path, panels):
    """depth.png of results: quality against the layers of a network or of a block, one panel per table.

    panels: {(title, unit): {label: {layers: one number per seed}}}. A dotted line marks the deepest network of all.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), layout="constrained", squeeze=False)
    for ax, ((title, unit), lines) in zip(axes[0], panels.items(), strict=True):
        for style, colour, (label, seeds) in zip(("s--", "o-"), ("black", "tab:blue"), lines.items(), strict=True):
            ax.plot(list(seeds), [np.mean(numbers) for numbers in seeds.values()], style, color=colour, label=label)
            for layers, numbers in seeds.items():
                ax.plot([layers] * len(numbers), numbers, ".", color=colour, ms=4, alpha=0.5)
        ticks = sorted({layers for seeds in lines.values() for layers in seeds})
        whole = [np.mean(seeds[ticks[-1]]) for seeds in lines.values() if ticks[-1] in seeds]
        if whole:
            ax.axhline(whole[0], color="grey", ls=":", label="the whole network")
        ax.set(xscale="log", xlabel="layers of the network, or of a block (log scale)", ylabel=unit, title=title)
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.legend()
    save_figure(figure, path)


METHODS = {  # of equal_memory.png: marker and colour
    "end to end": ("s", "black"), "blocks": ("o", "tab:blue"), "one shallow network": ("^", "tab:orange"),
    "mean of B such networks": ("v", "tab:green"),
}  # fmt: skip


def draw_equal_memory(path, panels):
    """equal_memory.png of results: quality against training memory, one panel per architecture. Up and left is better.

    panels: {(title, unit): {one of METHODS: (MiB, MiB with checkpointed activations, one number per seed)}}. A line
    joins the two, because checkpointing changes no weight; hollow markers are checkpointed. Small dots are seeds.
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
        ax.set(xscale="log", title=title, xlabel="training memory (MiB, log scale)", ylabel=unit)
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
    names[list(METHODS).index("one shallow network")] += "\n(looped: a plain transformer)"
    axes.flat[-1].legend(
        [*marks, hollow], names, loc="center", frameon=False, title="up and left is better; small dots: seeds"
    )
    save_figure(figure, path)
