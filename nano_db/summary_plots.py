"""Pictures of results: one a table, and memory against depth and number of blocks."""

from pathlib import Path

from nano_db.experiments import GROUPS, MEMORY_BLOCKS, MEMORY_LAYERS
from nano_db.memory import PARTS
from nano_db.plots import COLOURS, plt, save_figure
from nano_db.summary import QUALITY, median, memory_formula, values


def draw_all(folder, found):
    """A picture for each table of which anything has been run. found: see summary.read_records. Returns the paths."""
    paths = []
    for group in GROUPS:
        rows = {experiment: records for experiment, records in found.items() if experiment.group == group and records}
        if not rows or (group == "memory" and memory_formula(rows) is None):
            continue
        paths.append(Path(folder) / f"{group}.png")
        (draw_memory if group == "memory" else draw_group)(paths[-1], GROUPS[group][0], rows)
    return paths


def draw_group(path, title, rows):
    """Quality (a dot a seed, a bar for the mean), training memory by part, and seconds of a step, a line a row."""
    metrics = [
        quality for quality in QUALITY[next(iter(rows)).script] if any(values(r, quality[0]) for r in rows.values())
    ]
    panels, height = len(metrics) + 2, 1.4 + 0.36 * len(rows)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 + 3.1 * panels, height), sharey=True, layout="constrained")
    places = range(len(rows))
    for ax, (name, column, _) in zip(axes, metrics, strict=False):
        seen = []
        for place, records in zip(places, rows.values(), strict=True):
            numbers = values(records, name)
            if numbers:
                ax.plot(numbers, [place] * len(numbers), "o", color=COLOURS(0.25), ms=5, alpha=0.7)
                ax.plot(sum(numbers) / len(numbers), place, "|", color="black", ms=16)
            seen += numbers
        margin = 0.08 * (max(seen) - min(seen)) or 0.1
        ax.set(xlim=(min(seen) - margin, max(seen) + margin), xlabel=column)
        ax.grid(axis="x", alpha=0.3)

    left = [0.0] * len(rows)
    for i, part in enumerate(PARTS):
        sizes = [median(records, "memory_bytes", part) / 2**20 for records in rows.values()]
        axes[-2].barh(places, sizes, left=left, color=COLOURS(0.1 + 0.27 * i), label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes[-2].set(xlabel="training memory, MiB")
    axes[-2].legend(fontsize=7)
    times = [1000 * median(records, "seconds_per_step_all_blocks") for records in rows.values()]
    axes[-1].barh(places, times, color="grey")
    axes[-1].set(xlabel="ms a step, all blocks")
    axes[0].set_yticks(places, [experiment.row for experiment in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    save_figure(figure, path)


def draw_memory(path, title, rows):
    """Dots: measured. Lines: the formulas. Left without checkpointed activations, right with them."""
    formula = memory_formula(rows)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, checkpointed in zip(axes, (False, True), strict=True):
        for i, B in enumerate((1, *MEMORY_BLOCKS)):
            chosen = {
                int(experiment.given("--layers")): (median(records, "memory_bytes", "total"), formula(experiment))
                for experiment, records in rows.items()
                if int(experiment.given("--blocks", 1)) == B
                and ("--checkpoint-activations" in experiment.flags) == checkpointed
            }
            if chosen:
                measured, expected = ([size / 2**20 for size in sizes] for sizes in zip(*chosen.values(), strict=True))
                label = "end to end" if B == 1 else f"{B} blocks"
                ax.plot(list(chosen), measured, "o", color=COLOURS(0.4 * i), label=f"{label}: measured")
                ax.plot(list(chosen), expected, "-", color=COLOURS(0.4 * i), label="formula")
        kept = "layer inputs and one layer's activations kept" if checkpointed else "all activations kept"
        ax.set(xlabel="layers", title=kept, xticks=MEMORY_LAYERS, ylim=(0, None))
        ax.legend(fontsize=8)
    axes[0].set(ylabel="training memory, MiB")
    figure.suptitle(title)
    save_figure(figure, path)
