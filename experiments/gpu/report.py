"""The report of `python -m experiments.gpu`: report.md to be read or pasted into an issue, and report.json."""

from nano_db.trainer.checkpoints import write_json, write_text

NOT_BEGUN, RUNNING, STOPPED, PASSED, FAILED = "not begun", "not finished", "stopped by the user", "passed", "failed"
NO_TIME, PARTLY = "left out for lack of time", "passed as far as time allowed"
MIB = 2**20
QUALITY = {  # names of a run's metrics, and what to call them
    "bits_per_char": "bits per character",
    "edm_loss": "EDM loss",
    "frechet_small": "frechet_small",
    "accuracy": "accuracy",
}
TERMS = (
    "Blocks: the network is cut into blocks, each of which trains by itself (DiffusionBlocks). End to end: the same "
    "network, trained as usual. See README.md and docs/gpu.md."
)


def write(report, folder):
    """Write both files. They are complete whenever the command stops. The folder's own path stays private."""
    write_text(folder / "report.md", markdown(report).replace(f"{folder}/", ""))
    write_json(folder / "report.json", report)


def title(stage):
    return f"{stage['number']}. {stage['question']}"


def verdict(stage):
    """What became of a stage, in words."""
    judged = [record["passed"] for record in stage["records"] if record.get("passed") is not None]
    failed = judged.count(False)
    counts = f"{failed} of {len(judged)} failed" if failed else f"{len(judged)} of {len(judged)} passed"
    running = f", at {stage['at']}" if stage["status"] in (RUNNING, STOPPED) and stage["at"] else ""
    return stage["status"] + running + (f" ({counts}, {stage['seconds']:.0f} s)" if judged else "")


def markdown(report):
    about, stages = report["about"], report["stages"]
    lines = [f"# nano_db on {about['device']}", "", ", ".join(about.values()) + ".", "", f"`{report['command']}`", ""]
    lines += [TERMS, "", *table(["stage", "result"], [[title(stage), verdict(stage)] for stage in stages])]
    for stage in stages:
        if stage["records"]:
            missed = [f"- {miss(r)}" for r in stage["records"] if r.get("passed", True) is not True]
            for part in ([f"## {title(stage)}"], *SECTIONS[stage["name"]](stage["records"]), missed):
                lines += ["", *part] if part else []
    return "\n".join(lines) + "\n"


def table(head, rows):
    """Lines of a Markdown table; an empty one has none."""
    lines = [[*map(str, row)] for row in ([head, ["---"] * len(head), *rows] if rows else [])]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines]


def miss(record):
    """What failed or was left out, and why, in one line."""
    names = ("check", "case", "watched", "preset", "script", "method")
    what = ", ".join(str(record[name]) for name in names if name in record) or "the stage itself"
    measured = f"{record['difference']:.1e}, limit {record['limit']:.1e}. " if record.get("difference") else ""
    kind = "left out" if record["passed"] is None else "**failed**"
    return f"{kind}: {what}: {measured}{record.get('said', '')}"


# --- one function per stage: parts of its section, each a list of lines ---


def of_works(records):
    rows = []
    for name in dict.fromkeys(record["check"] for record in records if "check" in record):
        group = [record for record in records if record.get("check") == name]
        passed, judged = (sum(r["passed"] in values for r in group) for values in ((True,), (True, False)))
        measured = [record["difference"] for record in group if record.get("difference") is not None]
        limits = sorted({f"{record['limit']:.0e}" for record in group if record.get("limit")})
        largest = (f"{max(measured):.1e}" if any(measured) else "0") if measured else "–"
        notes = sorted({record["said"] for record in group if record["passed"] and record["said"]})
        rows.append([name, f"{passed} of {judged}", largest, ", ".join(limits), "; ".join(notes)])
    return [table(["check", "passed", "largest relative difference", "limits", "note"], rows)]


def of_speed(records):
    timed = [r for r in records if "seconds" in r]
    peaks = [f"{r['peak'] / 1e12:.3g} TFLOP/s, {r['said']}" for r in records if "peak" in r]
    peak = [f"Utilisation is a share of {text}; attention counts in full." for text in peaks]
    alike = [r for r in timed if not (r["compiled"] or r["script"] in ("plain", "looped"))]
    eager = [f"{r['ratio'][1]:.2f} ({r['script']})" for r in alike]
    short = [f"Time of a step of all blocks, end to end = 1: {', '.join(eager)}."] if eager else []
    rows, sides = [], {"plain": "gpt end to end; a plain GPT", "looped": "looped: 1 recurrence; end to end, 33"}
    for r in timed:
        low, middle, high = r["ratio"]
        rows.append([
            sides.get(r["script"], f"{r['script']}: all blocks; end to end"),
            f"{'compiled' if r['compiled'] else 'eager'}, {r['dtype']}, {r['data']}, batch {r['batch']}",
            "; ".join(f"{1000 * seconds:.1f}" for seconds in r["seconds"]), f"{middle:.2f} ({low:.2f}, {high:.2f})",
            "; ".join(f"{count:,.0f}" for count in r["per_second"]) + f" {r['unit']}",
            "; ".join(f"{100 * share:.1f}%" for share in r["utilisation"]) or "–",
        ])  # fmt: skip
    head = ["first; second", "configuration", "ms per step", "first over second: median of pairs (quartiles)"]
    timings = table([*head, "per second", "utilisation"], rows)
    counts = {"waits": "waits for the GPU", "copies": "copies to or from it", "kernels": "kernels"}
    rows = [
        [r["watched"], r["method"], *(f"{r[name]:g}" if name in r else "–" for name in counts)]
        for r in records
        if "waits" in r
    ]
    return [short, timings, peak, table(["a step of", "method", *counts.values()], rows)]


def of_memory(records):
    rows, totals = [], {}
    for r in (r for r in records if "planned" in r):
        method = r["method"] + (", checkpointed" if r["checkpointed"] else "")
        counted, peak = (f"{r[key] / MIB:,.1f}" if r.get(key) else "–" for key in ("counted", "peak"))
        more = f"{100 * (r['peak'] / r['planned'] - 1):+.0f}%" if r.get("peak") else "–"
        about = f"{r['script']}, preset {r['preset']}, {r['dtype']}, batch {r['batch']}"
        rows.append([about, method, f"{r['planned'] / MIB:,.1f}", counted, peak, more])
        totals[r["script"], r["preset"], method] = r.get("peak") or r.get("counted")
    shares = [
        f"{total / whole:.2f} ({script}, preset {preset})"
        for (script, preset, method), total in totals.items()
        if method == "blocks" and script != "looped" and total and (whole := totals.get((script, preset, "end to end")))
    ]
    short = [f"Memory of a block's step, end to end = 1: {', '.join(shares)}."] if shares else []
    head = ["MiB of a step of", "method", "by `experiments.plan`", "counted", "allocator's peak", "above the plan"]
    return [short, table(head, rows)]


def of_job(records):
    rows, samples, short = [], [], []
    for r in (r for r in records if "quality" in r):
        method = r["method"] + (", checkpointed" if "--checkpoint-activations" in r["flags"] else "")
        quality = [f"{text} {r['quality'][name]:.4f}" for name, text in QUALITY.items() if name in r["quality"]]
        about = f"{r['script']}, preset {r['preset']}, {r['data']}, {r['dtype']}"
        size = r["bytes"].get("allocator_peak", r["bytes"]["total"]) / MIB
        costs = f"{1000 * r['step']:.1f}", f"{r['seconds']:.0f}", f"{size:,.1f}"
        rows.append([about, method, f"{r['steps']:,} of {r['of']:,}", "; ".join(quality), *costs])
        if r["preset"] == "paper":
            short = ["The paper reports an accuracy of 0.6025 end to end and 0.5930 in blocks, after all steps."]
        if r["sample"]:  # indented: a fence could stand in the sample itself
            lines = [f"    {line}" for line in r["sample"].splitlines()]
            samples.append([f"A sample from {r['script']}, {method}:", "", *lines])
    head = ["run", "method", "steps", "quality", "ms per step (of all blocks)", "total seconds", "MiB, with the data"]
    return [short, table(head, rows), *samples]


SECTIONS = {"works": of_works, "speed": of_speed, "memory": of_memory, "job": of_job}
