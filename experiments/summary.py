"""Tables of results, made from the JSON files in results/<scale> and from nothing else.

summary.md has all tables of a scale. In other Markdown files a table stands between `<!-- results: cpu gpt -->` and
`<!-- end -->`, where fill() renews it: no number in it is typed by hand, and a test finds a table that differs from the
files. In place of `gpt` there may be `main`, the table of all architectures, or `conversion`.
"""

import json
import re
import statistics
from functools import reduce
from operator import getitem
from pathlib import Path

from experiments.comparisons import CONVERSION
from experiments.tables import GROUPS, SCALES, experiments
from nano_db.errors import UsageError
from nano_db.trainer.memory import PARTS

MARKED = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TRAINING = f"training MiB: {' + '.join(PARTS)}"
NONE, BITS = "–", ("bits_per_char", "bits per character (less is better)", 3)
QUALITY = {  # by script, or by table: the metric, its column, decimals
    "vit": (("accuracy", "accuracy (more is better)", 3), ("accuracy_walk", "accuracy of one walk", 3)),
    "dit": (("edm_loss", "EDM loss (less is better)", 4), ("frechet_small", "frechet_small (less is better)", 3)),
    **{"mdm": (BITS,), "gpt": (BITS,), "looped": (BITS,)},
    "dit-intervals": tuple((("edm_loss_by_block", b), f"EDM loss of block {b} (less is better)", 4) for b in range(3)),
}
QUALITY |= dict.fromkeys(("neighbours-glyphs", "neighbours-cifar10"), QUALITY["vit"][:1])
MAIN = {  # columns of the main table, and which rows of an architecture's own table they are
    "end to end": ("baseline",),
    "blocks": ("nano", "blocks"),
    "blocks, recipe paper": ("paper",),
    "control: one network of a block's memory": ("shallow", "one-recurrence"),
    "control: mean of B such": ("ensemble",),
}
PAPER = {"vit": "accuracy in %", "dit": "FID", "mdm": "bits per character", "gpt": "MAUVE", "looped": "MAUVE"}


def read_json(path, keys, advice):
    """The dictionary in a file, which must have `keys`. advice: what to do where the file is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content.keys() >= set(keys):
            return content
    except (OSError, ValueError, AttributeError):  # AttributeError: no dictionary
        pass
    raise UsageError(f"{path} is missing or damaged: {advice}")


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


def groups(found):
    """The tables of a scale, in their order."""
    return list(dict.fromkeys(experiment.group for experiment in found))


def of_group(group, found):
    return {experiment: records for experiment, records in found.items() if experiment.group == group}


def values(records, metric):
    """The metric of each record that has it. metric: its name; or its name, and a block."""
    name, *block = [metric] if isinstance(metric, str) else metric
    found = [record["result"]["metrics"][name] for record in records if name in record["result"]["metrics"]]
    return [number[block[0]] for number in found] if block else found


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


def depth_panels(found):
    """What figures.draw_depth draws, of those tables of depth that have been run."""
    panels = {}
    for group in ("vit-depth", "dit-depth", "gpt-depth"):
        plain, cut = {}, {}  # {layers of the network, or of a block: one number per seed}
        for experiment, records in of_group(group, found).items():
            (name, unit, _), *_ = QUALITY[experiment.script]
            if records:
                (plain if "--baseline" in experiment.flags else cut)[depth(experiment)] = values(records, name)
        if plain and cut:
            panels[GROUPS[group.split("-")[0]][0], unit] = {"plain network": plain, "blocks, 12 layers in all": cut}
    rows = {depth(e): records for e, records in of_group("dit-intervals", found).items() if records}
    if len(rows) > 1:
        lines = {
            f"block {b}": {layers: values(records, (name, b)) for layers, records in rows.items()}
            for (name, b), _, _ in QUALITY["dit-intervals"]
        }
        panels["Each of 3 blocks of the DiT", "EDM loss at its noise levels (less is better)"] = lines
    return panels


def depth(experiment):
    """Layers of the network, or of a block."""
    return int(experiment.given("--layers")) // int(experiment.given("--blocks", 1))


def markdown(columns, rows):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *rows))


def table(group, found):
    """The Markdown table of a group, or one of OVERVIEWS. found: as of read_records."""
    if group in OVERVIEWS:
        return OVERVIEWS[group](found)
    make = {"memory": memory_table, "checkpointing": checkpointing_table}.get(group, quality_table)
    return make(of_group(group, found))


def quality_table(rows):
    first = next(iter(rows))
    metrics = QUALITY.get(first.group) or QUALITY[first.script]
    metrics = [metric for metric in metrics if any(values(records, metric[0]) for records in rows.values())]
    is_script = not first.group.startswith("neighbours")  # neighbours do not say what a sample costs
    columns = ["run", "steps", "seeds", *(column for _, column, _ in metrics), "parameters", TRAINING]
    columns += ["ms per step, all blocks"] + ["one sample: layers evaluated", "ms"] * is_script
    last = ["paper" if is_script else "what passes between blocks"] * any(experiment.note for experiment in rows)
    lines = []
    for experiment, records in rows.items():
        cells = ["not run", *[NONE] * (len(columns) - 2)]
        if records:
            seeds = str(len(records)) + (f" of {experiment.seeds}" if len(records) < experiment.seeds else "")
            cells = [f"{records[0]['result']['steps']:,}", seeds]
            cells += [with_spread(values(records, name), decimals) for name, _, decimals in metrics]
            cells += [f"{median(records, 'parameters') / 1e6:.2f} M", mebibytes(records), milliseconds(records)]
            if is_script:
                cells += [f"{median(records, 'one_sample', 'layer_evaluations'):,.0f}"]
                cells += [f"{1000 * median(records, 'one_sample', 'seconds'):.1f}"]
        lines.append([experiment.row, *cells, *[experiment.note] * len(last)])
    return markdown([*columns, *last], lines)


def mebibytes(records):
    total, *parts = (f"{median(records, 'memory_bytes', part) / 2**20:.1f}" for part in ("total", *PARTS))
    return f"{total}: {' + '.join(parts)}"


def milliseconds(records):
    return f"{1000 * median(records, 'seconds_per_step_all_blocks'):.0f}"


def main_table(found):
    """Quality by method; and what blocks take of the end-to-end network's memory, and of its layers for a sample.

    No seconds: runs of one table may stand on different machines. benchmark.py times in pairs.
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
        papers = "; ".join(e.note for e in of_group(group, found) if e.note)
        for name, column, decimals in QUALITY[group]:
            if values(deep, name):
                cells = [with_spread(values(records, name), decimals) for records in chosen]
                lines.append([f"{GROUPS[group][0]}: {column}", *cells, *shares, f"{in_paper} {papers}"])
    return markdown(columns, lines) if lines else ""


def conversion_table(found):
    """By script and further steps: the network itself, blocks from nothing, and blocks that start from it."""
    columns = ["architecture", "the network, and its steps", "further steps", "the network itself"]
    columns += ["blocks from nothing", "blocks that start from it"]
    columns += ["layers evaluated for a sample: network / blocks", "training MiB: network / blocks"]
    by_name, lines = {experiment.name: records for experiment, records in found.items()}, []
    for script, (first, further) in CONVERSION.items():
        (name, column, decimals), *_ = QUALITY[script]
        network = by_name.get(f"{script}-conversion-network")
        for steps in further if network else ():
            runs = [by_name.get(f"{script}-conversion-{way}-{steps}", []) for way in ("further", "nothing", "started")]
            cells = [with_spread(values(records, name), decimals) for records in (network, *runs)]
            both = (network, runs[2]) if runs[2] else ()
            layers = " / ".join(f"{median(records, 'one_sample', 'layer_evaluations'):,.0f}" for records in both)
            memory = " / ".join(f"{median(records, 'memory_bytes', 'total') / 2**20:,.1f}" for records in both)
            row = [f"{GROUPS[script][0]}: {column}", f"{cells[0]} after {first}", f"{steps}"]
            lines.append([*row, *cells[1:], layers or NONE, memory or NONE])
    return markdown(columns, lines) if lines else ""


OVERVIEWS = {"main": main_table, "conversion": conversion_table}


def memory_table(rows):
    lines = [[experiment.row, mebibytes(records) if records else "not run"] for experiment, records in rows.items()]
    return markdown(["run", TRAINING], lines)


def checkpointing_table(rows):
    """What is left of the end-to-end network's memory, and of its seconds per step."""
    ways = {"baseline-checkpointed": "end to end, checkpointed", "blocks": "blocks"}
    ways |= {"blocks-checkpointed": "blocks, checkpointed"}
    by_name, lines = {experiment.name: records for experiment, records in rows.items()}, []
    for script in dict.fromkeys(experiment.script for experiment in rows):
        deep, *others = (by_name[f"checkpointing-{script}-{slug}"] for slug in ("baseline", *ways))
        cells = [mebibytes(deep), milliseconds(deep)] if deep else ["not run", NONE]
        for records in others:
            costs = (("memory_bytes", "total"), ("seconds_per_step_all_blocks",)) if deep and records else ()
            cells.append(", ".join(f"{ratio(records, deep, *keys):.2f}" for keys in costs) or NONE)
        lines.append([GROUPS[script][0], *cells])
    columns = ["architecture", f"end to end: {TRAINING}", "ms per step"]
    return markdown([*columns, *(f"{way}: share of memory, of seconds" for way in ways.values())], lines)


def fill(text, results):
    """`text`, with every marked table in it as the files under the folder `results` have it now."""

    def renew(match):
        start, scale, group, end = match.groups()
        found = read_records(Path(results) / scale, scale)[0] if scale in SCALES else {}
        if group not in (tables := [*OVERVIEWS, *groups(found)]):
            raise UsageError(f"{start.strip()}: there is no such scale or table; tables: {', '.join(tables)}")
        return start + table(group, found) + end

    return MARKED.sub(renew, text)


def summary(found, scale):
    """The text of summary.md. found: as of read_records."""
    text = f"""# Results at scale {scale}

`python -m experiments.results --scale {scale}` wrote this page from the JSON files beside it. Quality is the
mean ± standard deviation over seeds. Seconds are medians. Ratios are taken within a seed, because machines drift.
Memory is that of the largest network in training. `docs/running.md` says what each number means.
"""
    text += "".join(f"\n## All architectures\n\n{lines}" for make in OVERVIEWS.values() if (lines := make(found)))
    for group in groups(found):
        rows = of_group(group, found)
        records = [record for some in rows.values() for record in some]
        machines = {json.dumps(r["machine"] | r["result"]["versions"]) for r in records}
        data = {f"{r['settings']['data']} {r['data_sha256'][:12]}" for r in records}
        measured = re.sub('[{}"]', "", "; ".join((*sorted(machines), *sorted(data))))
        title, notes = GROUPS[group]
        text += f"\n## {title}\n\n{notes} Measured on: {measured or NONE}.\n\n{table(group, found)}"
    folder = f" --out out/results/{scale}/"  # where other runs look for the network that they start from
    named = any(experiment.init_from(0) for experiment in found)
    lines = (e.command_line(0) + (folder + e.file(0) if named else "") for e in found)
    also = " (`-s1` and `-s2` in the folders)" if named else ""
    text += f"\n## Commands\n\nRows of several seeds also have `--seed 1`, and 2{also}.\n"
    return f"{text}\n```\n" + "\n".join(dict.fromkeys(lines)) + "\n```\n"
