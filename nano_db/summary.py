"""Tables of results, made of the JSON files of results/<scale> and of nothing else, for summary.md and the README.

In a Markdown file a table stands between `<!-- results: cpu gpt -->` and `<!-- end -->`, and fill() puts it there. So
no number in it is typed by hand, and a test finds the table that does not say what the files say. `main` in place of
`gpt` is the table of all architectures.
"""

import json
import re
import statistics
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.experiments import GROUPS, MEMORY_LAYERS, SCALES, experiments
from nano_db.memory import PARTS

MARKED = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
LESS, MORE = "less is better", "more is better"
QUALITY = {  # by script: the metric, its column in the tables, decimals
    "vit": (("accuracy", f"accuracy ({MORE})", 3), ("accuracy_walk", "accuracy of one walk", 3)),
    "dit": (("edm_loss", f"EDM loss ({LESS})", 4), ("frechet_small", f"frechet_small ({LESS})", 3)),
    **dict.fromkeys(("mdm", "gpt", "looped"), (("bits_per_char", f"bits per character ({LESS})", 3),)),
}
NONE = "–"
MAIN = {  # columns of the main table, and which rows of an architecture's own table they are
    "end to end": ("baseline",),
    "blocks": ("nano", "blocks"),
    "blocks, recipe paper": ("paper",),
    "control: one network of a block's memory": ("shallow", "one-turn"),
    "control: mean of B such": ("ensemble",),
}
PAPER = {"vit": "accuracy in %", "dit": "FID", "mdm": "bits per character", "gpt": "MAUVE", "looped": "MAUVE"}


def read_records(folder, scale):
    """({experiment: [record of each seed]}, [files to be made again]) of the folder results/<scale>.

    A file is of no use when its command is no longer the experiment's: its flags have been changed since.
    """
    found, stale = {}, []
    for experiment in experiments(scale):
        found[experiment] = []
        for seed in range(experiment.seeds):
            path = Path(folder) / f"{experiment.file(seed)}.json"
            if not path.exists():
                continue
            record = read_record(path)
            if record["command"] == experiment.command_line(seed):
                found[experiment].append(record)
            else:
                stale.append(path)
    return found, stale


def read_record(path):
    try:
        record = json.loads(path.read_text())
        assert record.keys() >= {"command", "seed", "machine", "data_sha256", "settings", "result"}
        return record
    except (OSError, ValueError, AttributeError, AssertionError):
        raise UsageError(f"{path} is damaged: delete it, and run the command of its scale again") from None


def values(records, name):
    """The metric of each record that has it."""
    return [record["result"]["metrics"][name] for record in records if name in record["result"]["metrics"]]


def median(records, *keys):
    """Median of result[key][key]... over the records: a run that was slow once does not count."""
    return statistics.median(_numbers(records, keys).values())


def ratio(records, others, *keys):
    """Median of the ratios of result[key][key]... in `records` to that in `others`, over the seeds that both have.

    Runs of one seed are made soon after each other, so that a machine that is slower an hour later does less harm.
    """
    ours, theirs = _numbers(records, keys), _numbers(others, keys)
    return statistics.median(ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys())


def _numbers(records, keys):
    """{seed: result[key][key]...}"""
    numbers = {}
    for record in records:
        number = record["result"]
        for key in keys:
            number = number[key]
        numbers[record["seed"]] = number
    return numbers


def table(group, found):
    """The Markdown table of a group, or, for "main", of all architectures. found: see read_records."""
    if group == "main":
        return main_table(found)
    rows = {experiment: records for experiment, records in found.items() if experiment.group == group}
    return memory_table(rows) if group == "memory" else quality_table(rows)


def quality_table(rows):
    metrics = [
        quality for quality in QUALITY[next(iter(rows)).script] if any(values(r, quality[0]) for r in rows.values())
    ]
    columns = ["run", "steps", "seeds", *(column for _, column, _ in metrics), "parameters"]
    columns += [f"training MiB: {' + '.join(PARTS)}", "ms a step, all blocks", "one sample: layers evaluated", "ms"]
    columns.append("paper")
    lines = []
    for experiment, records in rows.items():
        if not records:
            lines.append([experiment.row, "not run", *[NONE] * (len(columns) - 3), experiment.paper])
            continue
        seeds = str(len(records)) + (f" of {experiment.seeds}" if len(records) < experiment.seeds else "")
        cells = [experiment.row, f"{records[0]['result']['steps']:,}", seeds]
        cells += [with_spread(values(records, name), decimals) for name, _, decimals in metrics]
        parts = " + ".join(f"{median(records, 'memory_bytes', part) / 2**20:.1f}" for part in PARTS)
        cells += [f"{median(records, 'parameters') / 1e6:.2f} M"]
        cells += [f"{median(records, 'memory_bytes', 'total') / 2**20:.1f}: {parts}"]
        cells += [f"{1000 * median(records, 'seconds_per_step_all_blocks'):.0f}"]
        cells += [f"{median(records, 'one_sample', 'layer_evaluations'):,.0f}"]
        cells += [f"{1000 * median(records, 'one_sample', 'seconds'):.1f}", experiment.paper]
        lines.append(cells)
    return markdown(columns, lines)


def main_table(found):
    """The Markdown table of all architectures: quality by method; of the blocks, what they take of the end-to-end
    network's memory, seconds of a step, and layers evaluated for one sample.
    """
    columns = ["architecture", *MAIN, "training memory", "step", "layers evaluated", "the paper: end to end, blocks"]
    lines = []
    for group, in_paper in PAPER.items():
        rows = {e.name.removeprefix(f"{group}-"): records for e, records in found.items() if e.group == group}
        chosen = [next((rows[slug] for slug in slugs if slug in rows), []) for slugs in MAIN.values()]
        deep, blocks, *_ = chosen
        costs = [NONE] * 3
        if {record["seed"] for record in deep} & {record["seed"] for record in blocks}:
            keys = ("memory_bytes", "total"), ("seconds_per_step_all_blocks",), ("one_sample", "layer_evaluations")
            costs = [f"{ratio(blocks, deep, *key):.2f}" for key in keys]
        papers = ", ".join(e.paper for e in found if e.group == group and e.paper)
        for name, column, decimals in QUALITY[group]:
            if values(deep, name):
                cells = [with_spread(values(records, name), decimals) for records in chosen]
                lines.append([f"{GROUPS[group][0]}: {column}", *cells, *costs, f"{in_paper} {papers}"])
    return markdown(columns, lines)


def with_spread(numbers, decimals):
    """The mean and, of several numbers, their standard deviation."""
    if not numbers:
        return NONE
    shown = f"{statistics.mean(numbers):.{decimals}f}"
    return shown if len(numbers) == 1 else f"{shown} ± {statistics.stdev(numbers):.{decimals}f}"


def memory_table(rows):
    formula, lines = memory_formula(rows), []
    for experiment, records in rows.items():
        if not records:
            lines.append([experiment.row, "not run", NONE, NONE])
            continue
        measured = median(records, "memory_bytes", "total")
        expected = formula(experiment) if formula else None
        shown = (f"{expected / 2**20:.1f}", f"{measured / expected:.3f}") if formula else (NONE, NONE)
        lines.append([experiment.row, f"{measured / 2**20:.1f}", *shown])
    return markdown(["run", "training MiB, measured", "by the formula", "ratio"], lines)


def memory_formula(rows):
    """A function experiment -> bytes, as GROUPS["memory"] says; None where the runs that it is read off are missing.

    rows: {experiment: records} of the group "memory".
    """
    ends = {}
    for experiment, records in rows.items():
        if "--baseline" in experiment.flags and "--checkpoint-activations" not in experiment.flags and records:
            ends[int(experiment.given("--layers"))] = records[0]
    few, many = MEMORY_LAYERS[0], MEMORY_LAYERS[-1]
    if not {few, many} <= ends.keys():
        return None

    def line(*parts):  # bytes without any layer, and with each
        low, high = (sum(ends[L]["result"]["memory_bytes"][part] for part in parts) for L in (few, many))
        slope = (high - low) / (many - few)
        return low - few * slope, slope

    (rest, four_p), (more, A) = line("weights", "gradients", "optimizer"), line("activations")
    settings = ends[few]["settings"]
    layer_input = 4 * settings["batch_size"] * settings["seq_len"] * settings["width"]

    def formula(experiment):
        layers = int(experiment.given("--layers")) / int(experiment.given("--blocks", 1))
        activations = A * layers
        if "--checkpoint-activations" in experiment.flags:
            activations = layer_input * (layers - 1) + A  # A has the input of the layer at work
        return rest + more + four_p * layers + activations

    return formula


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def fill(text, results):
    """`text`, with every marked table in it as the files under the folder `results` have it now."""

    def renew(match):
        start, scale, group, end = match.groups()
        if scale not in SCALES or group not in ("main", *GROUPS):
            raise UsageError(f"{start.strip()}: there is no such scale or table; tables: main, {', '.join(GROUPS)}")
        found, _ = read_records(Path(results) / scale, scale)
        return start + table(group, found) + end

    return MARKED.sub(renew, text)


def summary(folder, scale):
    """The text of summary.md."""
    found, _ = read_records(folder, scale)
    records = [record for some in found.values() for record in some]
    lines = [f"# Results at scale {scale}\n"]
    lines.append(
        f"`python -m nano_db.results --scale {scale}` wrote this page from the JSON files beside it. Quality is that "
        "of held-out data, ± its standard deviation over the seeds (one seed has none); seconds are medians over the "
        "seeds, and machines drift: the first table has ratios within a seed. Training memory is that of the largest "
        "network in training: one block, or the baseline. `README.md` says what each number means.\n"
    )
    tables = {}  # of each machine
    for experiment, some in found.items():
        for record in some:
            of_machine = tables.setdefault(json.dumps(record["machine"], sort_keys=True), [])
            if experiment.group not in of_machine:
                of_machine.append(experiment.group)
    machines = tables if len(tables) < 2 else [f"{machine} for {', '.join(some)}" for machine, some in tables.items()]
    versions = {json.dumps(record["result"]["versions"], sort_keys=True) for record in records}
    data = {f"{record['settings']['data']} {record['data_sha256'][:12]}" for record in records}
    for label, entries in (("Machine", machines), ("Versions", versions), ("Data, and its checksum", data)):
        shown = re.sub('[{}"]', "", "; ".join(sorted(entries)))
        lines.append(f"- {label}: {shown or NONE}")
    lines += ["\n## All architectures\n", table("main", found)]
    for group, (title, paper) in GROUPS.items():
        rows = [experiment for experiment in found if experiment.group == group]
        picture = f"![{title}]({group}.png)\n"
        lines += [f"\n## {title}\n", f"{paper} Here: `{shared_flags(rows)}`.\n", table(group, found), picture]
    lines += ["## Commands\n", "Each with `--seed 0`; rows of several seeds also with 1, and 2.\n", "```"]
    lines += [*(experiment.command_line(0) for experiment in found), "```"]
    return "\n".join(lines) + "\n"


def shared_flags(rows):
    """The flags that all rows have with the same value."""
    pairs = [_pairs(experiment.flags) for experiment in rows]
    return " ".join(pair for pair in pairs[0] if all(pair in others for others in pairs))


def _pairs(flags):
    """("--a", "1", "--b") -> ["--a 1", "--b"]"""
    return re.findall(r"--[a-z]\S*(?: (?!--)\S+)?", " ".join(flags))
