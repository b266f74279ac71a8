"""The report of `python -m experiments.gpu`: report.json, and report.md to be read or pasted into an issue."""

from nano_db.trainer.checkpoints import write_json, write_text

RUNNING, PASSED, FAILED = "not finished", "passed", "failed"
NO_TIME, PARTLY = "left out for time", "passed as far as the time went"
MIB = 2**20
EAGER = {False: "eager", True: "compiled"}


def write(report, folder):
    """Both files; whatever stops the run, those of the last record are there and whole."""
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", markdown(report))


def verdict(stage):
    """What became of a stage, in words."""
    judged = [record.get("passed") for record in stage["records"]]
    failed, found = judged.count(False), len(judged) - judged.count(None)
    words = [f"{failed} of {found} failed" if failed else f"{found} done"] if found else []
    words += [f"{stage['seconds']:.0f} s"] if judged else []
    return stage["status"] + (f" ({', '.join(words)})" if words else "")


def markdown(report):
    lines = ["# What this device does with nano_db", "", ", ".join(report["about"].values()) + ".", ""]
    lines += [f"`{report['command']}`", ""]
    stages = report["stages"]
    titles = [f"{stage['number']}. {stage['question']}" for stage in stages]
    lines += table(["stage", ""], [[title, verdict(stage)] for title, stage in zip(titles, stages, strict=True)])
    for title, stage in zip(titles, stages, strict=True):
        if records := stage["records"]:
            lines += ["", f"## {title}", ""]
            lines += SECTIONS[stage["name"]](records) + misses(records)
    return "\n".join(lines) + "\n"


def table(head, rows):
    """Lines of a Markdown table; an empty one has no head."""
    lines = [[*map(str, row)] for row in ([head, ["---"] * len(head), *rows] if rows else [])]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines]


def misses(records):
    """A line for each record that failed or was left out."""
    lines = []
    for record in (r for r in records if r.get("passed", True) is not True):
        names = ("check", "case", "watched", "preset", "script", "method")
        what = ", ".join(str(record[name]) for name in names if name in record)
        kind = "left out" if record["passed"] is None else "**failed**"
        measured = f"{record['difference']:.1e}, limit {record['limit']:.1e}. " if record.get("difference") else ""
        lines.append(f"- {kind}: {what}: {measured}{record.get('said', '')}")
    return ["", *lines] if lines else []


def checks(records):
    rows = []
    for name in dict.fromkeys(record["check"] for record in records if "check" in record):
        group = [record for record in records if record.get("check") == name]
        passed = sum(record["passed"] is True for record in group)
        measured = [record["difference"] for record in group if record.get("difference") is not None]
        notes = sorted({record["said"] for record in group if record["passed"] and record["said"]})
        largest = (f"{max(measured):.1e}" if any(measured) else "0") if measured else "–"
        rows.append([name, f"{passed} of {len(group)}", largest, "; ".join(notes)])
    return table(["check", "passed", "largest relative difference", ""], rows)


def costs(records):
    lines, rows = [], []
    for r in (r for r in records if "peak" in r):
        lines += [f"The peak of which utilisation is a share: {r['peak'] / 1e12:.1f} TFLOP/s, {r['said']}.", ""]
    for r in (r for r in records if "seconds" in r):
        label = "gpt end to end; a plain GPT" if r["script"] == "plain" else f"{r['script']} blocks; end to end"
        low, middle, high = r["ratio"]
        rows.append([
            label, f"{EAGER[r['compiled']]}, {r['dtype']}, {r['data']}, batch {r['batch']}",
            "; ".join(f"{1000 * seconds:.1f}" for seconds in r["seconds"]), f"{middle:.2f} ({low:.2f}, {high:.2f})",
            "; ".join(f"{count:,.0f}" for count in r["per_second"]) + f" {r['unit']}",
            "; ".join(f"{100 * share:.1f}%" for share in r["utilisation"]),
        ])  # fmt: skip
    head = ["what", "", "ms per step (of all blocks)", "ratio in pairs (quartiles)", "per second", "utilisation"]
    lines += table(head, rows)
    counts = ("waits", "copies", "launches")
    rows = [[r["watched"], r["method"], *(f"{r[name]:g}" for name in counts)] for r in records if "waits" in r]
    return lines + ([""] if rows else []) + table(["a step that prints nothing", "of", *counts], rows)


def held(records):
    rows = []
    for r in (r for r in records if "planned" in r):
        name = r["method"] + (", checkpointed" if r["checkpointed"] else "")
        counted, peak = (f"{r[key] / MIB:,.1f}" if r.get(key) else "–" for key in ("counted", "peak"))
        more = f"{100 * (r['peak'] / r['planned'] - 1):+.0f}%" if r.get("peak") else "–"
        about = f"{r['preset']}, {r['script']}, {r['dtype']}, batch {r['batch']}"
        rows.append([about, name, f"{r['planned'] / MIB:,.1f}", counted, peak, more])
    return table(["MiB of a training step", "of", "`plan`", "counted", "allocator's peak", "over `plan`"], rows)


def trained(records):
    rows, samples = [], []
    for r in (r for r in records if "quality" in r):
        method = r["method"] + (", checkpointed" if "--checkpoint-activations" in r["flags"] else "")
        quality = "; ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in r["quality"].items())
        about = f"{r['script']}, preset {r['preset']}, {r['data']}, {r['dtype']}"
        size = r["bytes"].get("allocator_peak", r["bytes"]["total"]) / MIB
        costs = f"{1000 * r['step']:.1f}", f"{r['seconds']:.0f}", f"{size:,.1f}"
        rows.append([about, method, f"{r['steps']:,} of {r['of']:,}", quality, *costs])
        if r["sample"]:  # indented: a fence could stand in the sample itself
            heading = f"A sample of {r['script']}, {method} (the prompt ends at the bar):"
            samples += ["", heading, "", *(f"    {line}" for line in r["sample"].splitlines())]
    head = ["run", "", "steps", "quality", "ms per step", "seconds in all", "MiB of a step"]
    return table(head, rows) + samples


SECTIONS = {"works": checks, "speed": costs, "memory": held, "job": trained}
