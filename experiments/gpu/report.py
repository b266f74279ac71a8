"""The report of `python -m experiments.gpu`: report.json, and report.md to be read or pasted into an issue."""

from nano_db.trainer.checkpoints import write_json, write_text

RUNNING, NO_TIME = "not finished", "left out for time"
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
    words = f"{failed} of {found} failed" if failed else f"{found} done"
    return f"{stage['status']} ({words})" if found else stage["status"]


def markdown(report):
    lines = ["# What this device does with nano_db", "", ", ".join(report["about"].values()) + ".", ""]
    lines += [f"`{report['command']}`", ""]
    stages = report["stages"]
    lines += table(["stage", "", "seconds"], [[s["question"], verdict(s), f"{s['seconds']:.0f}"] for s in stages])
    for number, stage in enumerate(stages, 1):
        if records := stage["records"]:
            lines += ["", f"## {number}. {stage['question']}", ""]
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
        lines.append(f"- {kind}: {what}: {measured}{record['said']}")
    return ["", *lines] if lines else []


def checks(records):
    rows = []
    for name in dict.fromkeys(record["check"] for record in records):
        group = [record for record in records if record["check"] == name]
        passed = sum(record["passed"] is True for record in group)
        measured = [record["difference"] for record in group if record.get("difference") is not None]
        notes = sorted({record["said"] for record in group if record["passed"] and record["said"]})
        largest = (f"{max(measured):.1e}" if any(measured) else "0") if measured else "–"
        rows.append([name, f"{passed} of {len(group)}", largest, "; ".join(notes)])
    return table(["check", "passed", "largest relative difference", ""], rows)


def costs(records):
    peak = records[0]
    lines = [f"The peak of which utilisation is a share: {peak['peak'] / 1e12:.1f} TFLOP/s, {peak['said']}.", ""]
    rows = []
    for r in (r for r in records if "seconds" in r):
        label = "gpt end to end; a plain GPT" if r["script"] == "plain" else f"{r['script']} blocks; end to end"
        low, middle, high = r["ratio"]
        rows.append([
            label, f"{EAGER[r['compiled']]}, {r['dtype']}, {r['data']}",
            both(f"{1000 * seconds:.1f}" for seconds in r["seconds"]), f"{middle:.2f} ({low:.2f}, {high:.2f})",
            both(f"{count:,.0f}" for count in r["per_second"]) + f" {r['unit']}",
            both(f"{100 * share:.1f}%" for share in r["utilisation"]),
        ])  # fmt: skip
    head = ["what", "", "ms per step (of all blocks)", "ratio in pairs (quartiles)", "per second", "utilisation"]
    lines += table(head, rows)
    rows = [[r["watched"], r["method"], *(f"{r[k]:g}" for k in WATCHED)] for r in records if "launches" in r]
    return lines + ([""] if rows else []) + table(["a step that prints nothing", "of", *WATCHED], rows)


WATCHED = ("waits", "copies", "launches")


def both(pair):
    return "; ".join(pair)


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
        quality = ", ".join(f"{name} {value:.4f}" for name, value in r["quality"].items())
        size = r["bytes"].get("allocator_peak", r["bytes"]["total"]) / MIB
        about = f"{r['script']}, preset {r['preset']}, {r['data']}, {r['dtype']}"
        cells = [about, r["method"], f"{r['steps']:,} of {r['of']:,}", quality, f"{1000 * r['step']:.1f}"]
        rows.append([*cells, f"{r['seconds']:.0f}", f"{size:,.1f}"])
        if r["sample"]:
            samples += [
                "",
                f"{r['script']}, {r['method']} (the prompt ends at the bar):",
                "",
                "```",
                r["sample"],
                "```",
            ]
    head = ["run", "", "steps", "quality", "ms per step", "seconds in all", "MiB held"]
    return table(head, rows) + samples


SECTIONS = {"works": checks, "speed": costs, "memory": held, "job": trained}
