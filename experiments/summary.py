"""Tables of results, made from the JSON files in results/<scale> and from nothing else.

summary.md has all tables of a scale. In other Markdown files a table stands between `<!-- results: laptop gpt -->` and
`<!-- end -->`, where fill() renews it: no number in it is typed by hand, and a test finds a table that differs from the
files. In place of `gpt` there may be a table of all architectures: one of SPECIAL, like the README's `verdicts`.
"""

import json
import re
import statistics
from functools import reduce
from operator import getitem
from pathlib import Path

from experiments.differences import paired
from experiments.tables import GROUPS, SCALES, SCRIPTS, experiments
from nano_db.errors import UsageError

MARKED = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NONE, BITS = "–", ("bits_per_char", "bits per character (lower is better)", 3)
QUALITY = {  # by script: the metric, its column, decimals
    "vit": (("accuracy", "accuracy (higher is better)", 3), ("accuracy_walk", "accuracy of one walk", 3)),
    "dit": (("edm_loss", "EDM loss (lower is better)", 4), ("frechet_small", "frechet_small (lower is better)", 3)),
    **{"mdm": (BITS,), "gpt": (BITS,), "looped": (BITS,)},
}
MAIN = {  # columns of the main table, and which rows of an architecture they are
    "blocks": "blocks", "end to end": "baseline", "one shallow network": "shallow",
    "mean of B such networks": "ensemble",
}  # fmt: skip
COMPARED = (  # in the table of differences
    ("blocks", "baseline"), ("blocks", "shallow"), ("blocks", "ensemble"),
    ("blocks-few", "baseline"), ("blocks-few", "shallow-few"),
)  # fmt: skip
CERTAIN = 0.05  # p below which a difference counts
MEMORIES = "memory_bytes", "checkpointed_bytes"
NAMES = {"vit": "ViT", "dit": "DiT", "mdm": "masked diffusion", "gpt": "GPT", "looped": "looped"}
TASKS = {
    "vit": "classify letters", "dit": "generate letters", "mdm": "fill in masked code", "gpt": "write code",
    "looped": "write code, looped",
}  # fmt: skip


def read_json(path, keys, advice):
    """The dictionary in a file, which must have `keys`. advice: what to do where the file is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content.keys() >= set(keys):
            return content
    except (OSError, ValueError, AttributeError, RecursionError):  # AttributeError: no dictionary
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


def by_slug(script, found):
    """{what a row of an architecture is, like "blocks": (experiment, records)}."""
    return {e.name.removeprefix(f"{script}-"): (e, records) for e, records in of_group(script, found).items()}


def values(records, metric):
    """The metric of each record that has it."""
    return [record["result"]["metrics"][metric] for record in records if metric in record["result"]["metrics"]]


def with_spread(numbers, decimals):
    """The mean and, of several numbers, their standard deviation."""
    spread = f" ± {statistics.stdev(numbers):.{decimals}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{decimals}f}{spread}" if numbers else NONE


def median(records, *keys):
    """Median of result[key][key]... over the records: a single slow run does not matter."""
    return statistics.median(reduce(getitem, keys, record["result"]) for record in records)


def ratio(records, others, *keys):
    """Median of the ratios of result[key][key]... in `records` to those in `others`, over the seeds that both have.

    Runs of one seed are close together in time, so a machine that slows down later distorts the ratio less.
    """
    ours, theirs = ({r["seed"]: reduce(getitem, keys, r["result"]) for r in some} for some in (records, others))
    return statistics.median(ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys())


def markdown(columns, rows):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *rows))


def table(group, found, whole=False):
    """The Markdown table of a group, or one over all architectures. found: as returned by read_records.

    whole: with all columns, as in summary.md. On other pages, the tables of further questions have only a few.
    """
    if group in SPECIAL:
        return SPECIAL[group](found)
    rows = of_group(group, found)
    kinds = COLUMNS if whole else [kind for kind in COLUMNS if kind in (ON_PAGES if group in SCRIPTS else FURTHER)]
    return quality_table(rows, kinds)


def quality_table(rows, kinds):
    """kinds: names in COLUMNS, besides the run, its command and its quality."""
    first = next(iter(rows))
    metrics = [m for m in QUALITY[first.script] if any(values(records, m[0]) for records in rows.values())]
    quality = [column for _, column, _ in metrics] or ["quality"]
    lines = []
    for experiment, records in rows.items():
        scores = [with_spread(values(records, name), decimals) for name, _, decimals in metrics] or [NONE]
        cells = [COLUMNS[kind](experiment, records) if records else NONE for kind in kinds]
        lines.append([experiment.row, typed(experiment), *(scores if records else ["not run", *scores[1:]]), *cells])
    return markdown(["run", "command", *quality, *kinds], lines)


def seeds_of(experiment, records):
    return str(len(records)) + (f" of {experiment.seeds}" if len(records) < experiment.seeds else "")


COLUMNS = {  # of a table of results: how to fill each from a row's Experiment and its records
    "steps": lambda e, records: f"{records[0]['result']['steps']:,}",
    "learning rate": lambda e, records: f"{records[0]['settings']['learning_rate']:g}",
    "seeds": seeds_of,
    "parameters": lambda e, records: f"{median(records, 'parameters') / 1e6:.2f} M",
    "training MiB": lambda e, records: f"{median(records, MEMORIES[0], 'total') / 2**20:.1f}",
    "checkpointed": lambda e, records: f"{median(records, MEMORIES[1], 'total') / 2**20:.1f}",
    "ms per step, all blocks": lambda e, records: f"{1000 * median(records, 'seconds_per_step_all_blocks'):.0f}",
    "one sample: layers evaluated": lambda e, records: f"{median(records, 'one_sample', 'layer_evaluations'):,.0f}",
    "ms": lambda e, records: f"{1000 * median(records, 'one_sample', 'seconds'):.1f}",
    "paper": lambda e, records: e.note,
}
FURTHER = ("training MiB",)  # the columns of further questions on other pages than summary.md
ON_PAGES = (*FURTHER, "learning rate", "checkpointed", "ms per step, all blocks", "one sample: layers evaluated", "ms")


def typed(experiment):
    """The command of a row without its seed, as code."""
    return f"`{experiment.command_line(0).removesuffix(' --seed 0')}`"


def main_table(found):
    """A row per architecture: the command that trains its blocks, and the quality of every method."""
    columns = ["command of the blocks", "", *MAIN, "training memory: blocks", "end to end, checkpointed", "both"]
    lines = []
    for script in SCRIPTS:
        rows = by_slug(script, found)
        chosen = [rows.get(slug, (None, []))[1] for slug in MAIN.values()]
        blocks, deep, *_ = chosen
        if deep and blocks:
            whole = median(deep, "memory_bytes", "total")
            saving = (blocks, "memory_bytes"), (deep, "checkpointed_bytes"), (blocks, "checkpointed_bytes")
            shares = [f"{median(records, memory, 'total') / whole:.2f}" for records, memory in saving]
            for i, (name, column, decimals) in enumerate(QUALITY[script]):
                if values(deep, name):
                    cells = [with_spread(values(records, name), decimals) for records in chosen]
                    lines.append(
                        [typed(rows["blocks"][0]) if i == 0 else "", column, *cells, *(shares if i == 0 else [""] * 3)]
                    )
    return markdown(columns, lines) if lines else ""


def differences_table(found):
    """The blocks against every other method, seed by seed: which differences are real."""
    columns = ["network", "measure", "compared", "seeds", "the first is better by", "standard error", "p", "verdict"]
    lines = []
    for script in SCRIPTS:
        rows = by_slug(script, found)
        for name, column, decimals in QUALITY[script]:
            for ours, theirs in (pair for pair in COMPARED if rows.keys() >= set(pair)):
                if found_between := difference(rows[ours][1], rows[theirs][1], name, column):
                    seeds, better, error, p = found_between
                    cells = [f"{better:+.{decimals}f}", f"{error:.{decimals}f}", f"{p:.2g}", verdict(better, p)]
                    names = f"{rows[ours][0].row} / {rows[theirs][0].row}"
                    lines.append([NAMES[script], short(column).rstrip(" ↑↓"), names, str(seeds), *cells])
    return markdown(columns, lines) if lines else ""


def difference(ours, theirs, metric, column):
    """(seeds, by how much ours are better, its standard error, p) over the seeds that both have; None below two."""
    first, second = ({r["seed"]: x for r in records for x in values([r], metric)} for records in (ours, theirs))
    if len(seeds := first.keys() & second.keys()) < 2:
        return None
    mean, error, p = paired([first[seed] for seed in seeds], [second[seed] for seed in seeds])
    return len(seeds), mean if "higher" in column else -mean, error, p


def verdict(better, p):
    return "tie" if p >= CERTAIN else "win" if better > 0 else "loss"


def short(column):
    """A column's name with an arrow that says which way is better."""
    column = column.replace("bits per character", "bits")
    return column.replace(" (higher is better)", " ↑").replace(" (lower is better)", " ↓")


def commands_table(found):
    """The score of each script, in blocks and end to end, and the training time of its blocks."""
    columns = ["command", "task", "minutes", "measure", "blocks", "end to end (`--baseline`)"]
    lines = []
    for script in SCRIPTS:
        rows, (name, column, decimals) = by_slug(script, found), QUALITY[script][0]
        (blocks, ours), (_, theirs) = rows["blocks"], rows["baseline"]
        if ours and theirs:
            seconds = [r["result"]["seconds_per_step_all_blocks"] * r["result"]["steps"] for r in ours]
            scores = [f"{statistics.mean(values(records, name)):.{decimals}f}" for records in (ours, theirs)]
            minutes = f"{statistics.median(seconds) / 60:.0f}"
            lines.append([typed(blocks), TASKS[script], minutes, short(column), *scores])
    return markdown(columns, lines) if lines else ""


def verdicts_table(found):
    """Blocks compared with the whole network, and with the better of the two controls of equal memory."""
    columns = ["network", "end to end", "blocks", "best control of equal memory", "against end to end, control"]
    lines = []
    for script in SCRIPTS:
        rows, (name, column, decimals) = by_slug(script, found), QUALITY[script][0]
        ours, theirs = rows["blocks"][1], rows["baseline"][1]
        controls = [rows[slug] for slug in ("shallow", "ensemble") if slug in rows and rows[slug][1]]
        if ours and theirs and controls:
            better = max if "higher" in column else min
            # by the validation half, so that the test half which is shown does not choose its opponent
            _, best = better(controls, key=lambda row: statistics.mean(values(row[1], f"validation_{name}")))
            count = best[0]["settings"].get("ensemble", 1)
            several = f"mean of {count}" if count > 1 else "one"
            said = []
            for records in (theirs, best):
                between = difference(ours, records, name, column)
                said.append(verdict(between[1], between[3]) if between else NONE)
            scores = [with_spread(values(records, name), decimals) for records in (theirs, ours, best)]
            cells = [*scores[:2], f"{scores[2]} ({several})", ", ".join(said)]
            lines.append([f"{NAMES[script]}: {short(column)}", *cells])
    return markdown(columns, lines) if lines else ""


def rates_table(found):
    """The validation score of each method at each learning rate, the best in bold."""
    by_method = {}
    for experiment, records in of_group("rates", found).items():
        script, method, rate = experiment.row.split(", ")
        by_method.setdefault((script, method), {})[rate] = records
    lines = []
    for (script, method), by_rate in by_method.items():
        (name, column, decimals), *_ = QUALITY[script]
        scores = {rate: values(records, f"validation_{name}") for rate, records in by_rate.items()}
        best = best_rate(scores, column)
        cells = []
        for rate, numbers in scores.items():
            cell = f"{rate}: {with_spread(numbers, decimals)}"
            cells.append(f"**{cell}**" if rate == best else cell)
        lines.append([f"{GROUPS[script][0]}, {method}", column, *cells])
    widest = max(len(line) for line in lines)
    lines = [[*line, *[""] * (widest - len(line))] for line in lines]
    return markdown(["network", "validation", "learning rate: score", *[""] * (widest - 3)], lines)


def best_rate(scores, column):
    """The key of `scores` {rate: [score of seed 0, ...]} with the best score of seed 0; None if none has been run."""
    sign = -1 if "higher" in column else 1
    done = {rate: sign * numbers[0] for rate, numbers in scores.items() if numbers}
    return min(done, key=done.get) if done else None


def depth_panels(found):
    """What figures.draw_depth draws, of those tables of depth that have been run."""
    panels = {}
    for script in ("vit", "gpt"):
        plain, blocks = {}, {}  # {layers of the network, or of a block: one number per seed}
        for records in of_group(f"{script}-depth", found).values():
            name, unit, _ = QUALITY[script][0]
            if records:
                settings = records[0]["settings"]
                several = 1 if settings["baseline"] else settings["blocks"]
                (plain if settings["baseline"] else blocks)[settings["layers"] // several] = values(records, name)
        if plain and blocks:
            panels[GROUPS[script][0], unit] = {"plain network": plain, "blocks": blocks}
    return panels


def memory_panels(found):
    """What figures.draw_equal_memory draws: {(title, unit): {method: (MiB, MiB with checkpointed activations, one
    number per seed)}}, of those architectures that have been run.
    """
    panels = {}
    for script in SCRIPTS:
        name, unit, _ = QUALITY[script][0]
        rows, points = by_slug(script, found), {}
        for label, slug in MAIN.items():
            if records := rows.get(slug, (None, []))[1]:
                plain, saving = (median(records, memory, "total") / 2**20 for memory in MEMORIES)
                points[label] = (plain, saving, values(records, name))
        if len(points) > 1:
            panels[NAMES[script], unit] = points
    return panels


def fill(text, results):
    """`text`, with every marked table in it as the files under the folder `results` have it now."""

    def renew(match):
        start, scale, group, end = match.groups()
        tables = [*SPECIAL, *groups(experiments(scale))] if scale in SCALES else []
        if group not in tables:
            names = f"scales: {', '.join(SCALES)}; tables: {', '.join(tables or SPECIAL)}"
            raise UsageError(f"{start.strip()}: there is no such scale or table ({names})")
        return start + table(group, read_records(Path(results) / scale, scale)[0]) + end

    return MARKED.sub(renew, text)


def summary(found, scale):
    """The text of summary.md. found: as returned by read_records."""
    text = f"""# Results of preset {scale}

`python -m experiments.results --scale {scale}` wrote this page from the JSON files beside it. Quality is the
mean ± standard deviation over seeds, on the half of the held-out data not used to choose settings. Times are medians,
with one thread per run. Memory is that of the largest network in training, without and with checkpointed activations.
`docs/running.md` says what each number means.
"""
    text += f"\n## All architectures\n\n{main_table(found) or 'Not run.' + chr(10)}"
    text += f"\n## Which differences are real\n\n{differences_table(found) or 'Not run.' + chr(10)}"
    for group in groups(found):
        records = [record for some in of_group(group, found).values() for record in some]
        machines = {json.dumps(r["machine"] | r["result"]["versions"]) for r in records}
        data = {f"{r['settings']['data']} {r['data_sha256'][:12]}" for r in records}
        measured = re.sub('[{}"]', "", "; ".join((*sorted(machines), *sorted(data))))
        title, notes = GROUPS[group]
        text += f"\n## {title}\n\n{notes} Measured on: {measured or NONE}.\n\n{table(group, found, whole=True)}"
    folder = f" --out out/results/{scale}/"  # where other runs look for the network that they start from
    starts = {experiment.init_from(0) for experiment in found}
    lines = (e.command_line(0) + (folder + e.file(0) if e.file(0) in starts else "") for e in found)
    text += "\n## Commands\n\nRows with several seeds were also run with `--seed 1` and `--seed 2`.\n"
    return f"{text}\n```\n" + "\n".join(dict.fromkeys(lines)) + "\n```\n"


SPECIAL = {  # tables over all architectures, by the name that a mark has
    "main": main_table, "differences": differences_table, "rates": rates_table, "commands": commands_table,
    "verdicts": verdicts_table,
}  # fmt: skip
