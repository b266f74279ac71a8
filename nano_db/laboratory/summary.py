"""Tables of results, made of the JSON files of results/<scale> and of nothing else.

summary.md has all tables of a scale. In other Markdown files a table stands between `<!-- results: cpu gpt -->` and
`<!-- end -->`, where fill() renews it: no number in it is typed by hand, and a test finds the table that does not say
what the files say. `main` in place of `gpt` is the table of all architectures.
"""

import json
import re
import statistics
from functools import reduce
from operator import getitem
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.laboratory.experiments import GROUPS, SCALES, experiments
from nano_db.machinery.memory import PARTS

MARKED = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NONE, BITS = "–", ("bits_per_char", "bits per character (less is better)", 3)
QUALITY = {  # by script: the metric, its column in the tables, decimals
    "vit": (("accuracy", "accuracy (more is better)", 3), ("accuracy_walk", "accuracy of one walk", 3)),
    "dit": (("edm_loss", "EDM loss (less is better)", 4), ("frechet_small", "frechet_small (less is better)", 3)),
    **{"mdm": (BITS,), "gpt": (BITS,), "looped": (BITS,)},
}
MAIN = {  # columns of the main table, and which rows of an architecture's own table they are
    "end to end": ("baseline",),
    "blocks": ("nano", "blocks"),
    "blocks, recipe paper": ("paper",),
    "control: one network of a block's memory": ("shallow", "one-turn"),
    "control: mean of B such": ("ensemble",),
}
PAPER = {"vit": "accuracy in %", "dit": "FID", "mdm": "bits per character", "gpt": "MAUVE", "looped": "MAUVE"}


def read_json(path, keys, mend):
    """The dictionary in a file, which must have `keys`. mend: what to do where the file is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text())
        assert content.keys() >= set(keys)
        return content
    except (OSError, ValueError, AttributeError, AssertionError):
        raise UsageError(f"{path} is missing or damaged: {mend}") from None


def read_records(folder, scale):
    """({experiment: [record of each seed]}, [stale files]) of the folder results/<scale>.

    A file is stale when its command is no longer that of the experiment, whose flags have changed since.
    """
    keys = ("command", "seed", "machine", "data_sha256", "settings", "result")
    found, stale = {experiment: [] for experiment in experiments(scale)}, []
    for experiment, records in found.items():
        for seed in range(experiment.seeds):
            path = Path(folder) / f"{experiment.file(seed)}.json"
            if path.exists():
                record = read_json(path, keys, "delete it, and run the command of its scale again")
                is_stale = record["command"] != experiment.command_line(seed)
                stale.append(path) if is_stale else records.append(record)
    return found, stale


def of_group(group, found):
    return {experiment: records for experiment, records in found.items() if experiment.group == group}


def values(records, name):
    """The metric of each record that has it."""
    return [record["result"]["metrics"][name] for record in records if name in record["result"]["metrics"]]


def with_spread(numbers, decimals):
    """The mean and, of several numbers, their standard deviation."""
    spread = f" ± {statistics.stdev(numbers):.{decimals}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{decimals}f}{spread}" if numbers else NONE


def median(records, *keys):
    """Median of result[key][key]... over the records: a run that was slow once does not count."""
    return statistics.median(reduce(getitem, keys, record["result"]) for record in records)


def ratio(records, others, *keys):
    """Median of the ratios of result[key][key]... in `records` to that in `others`, over the seeds that both have.

    Runs of one seed are made soon after each other, so that a machine that is slower an hour later does less harm.
    """
    ours, theirs = ({r["seed"]: reduce(getitem, keys, r["result"]) for r in some} for some in (records, others))
    return statistics.median(ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys())


def shown_metrics(rows):
    """Those of QUALITY that any of the rows has."""
    metrics = QUALITY[next(iter(rows)).script]
    return [metric for metric in metrics if any(values(records, metric[0]) for records in rows.values())]


def depth_panels(found):
    """What plots.draw_depth draws, of those architectures whose tables of depth have been run."""
    panels = {}
    for group in [group for group in GROUPS if group.endswith("-depth")]:
        plain, cut = {}, {}  # {layers of the network, or of a block: a number a seed}
        for experiment, records in of_group(group, found).items():
            (name, unit, _), *_ = QUALITY[experiment.script]
            layers, blocks = int(experiment.given("--layers")), int(experiment.given("--blocks", 1))
            if records:
                (plain if "--baseline" in experiment.flags else cut)[layers // blocks] = values(records, name)
        if plain and cut:
            panels[GROUPS[group.split("-")[0]][0], unit] = {"plain network": plain, "blocks, 12 layers in all": cut}
    return panels


def markdown(columns, rows):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *rows))


def table(group, found):
    """The Markdown table of a group, or, for "main", of all architectures. found: as of read_records."""
    if group == "main":
        return main_table(found)
    return (memory_table if group == "memory" else quality_table)(of_group(group, found))


def quality_table(rows):
    metrics = shown_metrics(rows)
    columns = ["run", "steps", "seeds", *(column for _, column, _ in metrics), "parameters"]
    columns += [f"training MiB: {' + '.join(PARTS)}", "ms a step, all blocks", "one sample: layers evaluated", "ms"]
    lines = []
    for experiment, records in rows.items():
        cells = ["not run", *[NONE] * (len(columns) - 2)]
        if records:
            seeds = str(len(records)) + (f" of {experiment.seeds}" if len(records) < experiment.seeds else "")
            total, *parts = (f"{median(records, 'memory_bytes', part) / 2**20:.1f}" for part in ("total", *PARTS))
            cells = [f"{records[0]['result']['steps']:,}", seeds]
            cells += [with_spread(values(records, name), decimals) for name, _, decimals in metrics]
            cells += [f"{median(records, 'parameters') / 1e6:.2f} M", f"{total}: {' + '.join(parts)}"]
            cells += [f"{1000 * median(records, 'seconds_per_step_all_blocks'):.0f}"]
            cells += [f"{median(records, 'one_sample', 'layer_evaluations'):,.0f}"]
            cells += [f"{1000 * median(records, 'one_sample', 'seconds'):.1f}"]
        lines.append([experiment.row, *cells, experiment.paper])
    return markdown([*columns, "paper"], lines)


def main_table(found):
    """Quality by method; and what blocks take of the end-to-end network's memory, and of its layers for a sample.

    No seconds: runs of one table may stand on different machines. race.py times in pairs.
    """
    columns = ["architecture", *MAIN, "training memory", "layers evaluated", "the paper: end to end; blocks"]
    costs = ("memory_bytes", "total"), ("one_sample", "layer_evaluations")
    lines = []
    for group, in_paper in PAPER.items():
        rows = {e.name.removeprefix(f"{group}-"): records for e, records in of_group(group, found).items()}
        chosen = [next((rows[slug] for slug in slugs if slug in rows), []) for slugs in MAIN.values()]
        deep, blocks, *_ = chosen
        both = {record["seed"] for record in deep} & {record["seed"] for record in blocks}
        shares = [f"{ratio(blocks, deep, *keys):.2f}" if both else NONE for keys in costs]
        papers = "; ".join(e.paper for e in of_group(group, found) if e.paper)
        for name, column, decimals in QUALITY[group]:
            if values(deep, name):
                cells = [with_spread(values(records, name), decimals) for records in chosen]
                lines.append([f"{GROUPS[group][0]}: {column}", *cells, *shares, f"{in_paper} {papers}"])
    return markdown(columns, lines)


def memory_table(rows):
    lines = []
    for experiment, records in rows.items():
        counts = [f"{median(records, 'memory_bytes', part) / 2**20:.1f}" for part in ("total", *PARTS) if records]
        lines.append([experiment.row, *(counts or ["not run", *[NONE] * len(PARTS)])])
    return markdown(["run", "training MiB", *PARTS], lines)


def fill(text, results):
    """`text`, with every marked table in it as the files under the folder `results` have it now."""

    def renew(match):
        start, scale, group, end = match.groups()
        if scale not in SCALES or group not in ("main", *GROUPS):
            raise UsageError(f"{start.strip()}: there is no such scale or table; tables: main, {', '.join(GROUPS)}")
        return start + table(group, read_records(Path(results) / scale, scale)[0]) + end

    return MARKED.sub(renew, text)


def summary(found, scale):
    """The text of summary.md. found: as of read_records."""
    text = f"""# Results at scale {scale}

`python -m nano_db.laboratory.results --scale {scale}` wrote this page from the JSON files beside it. Quality is the
mean ± standard deviation over seeds. Seconds are medians. Ratios in the first table are those within a seed, for
machines drift. Memory is that of the largest network in training. `docs/running.md` says what each number means.

## All architectures

{table("main", found)}"""
    for group, (title, notes) in GROUPS.items():
        rows = of_group(group, found)
        records = [record for some in rows.values() for record in some]
        machines = {json.dumps(r["machine"] | r["result"]["versions"]) for r in records}
        data = {f"{r['settings']['data']} {r['data_sha256'][:12]}" for r in records}
        measured = re.sub('[{}"]', "", "; ".join((*sorted(machines), *sorted(data))))
        text += f"\n## {title}\n\n{notes} Measured on: {measured or NONE}.\n\n{table(group, found)}"
    commands = "\n".join(dict.fromkeys(experiment.command_line(0) for experiment in found))
    return f"{text}\n## Commands\n\nRows of several seeds also have `--seed 1`, and 2.\n\n```\n{commands}\n```\n"
