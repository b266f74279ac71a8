"""Stage 4. The main job: blocks and the end-to-end network, trained by the scripts for as long as the time allows."""

import json
import shutil
import statistics
import time
from itertools import pairwise

from experiments.gpu.cases import attempt, configure
from nano_db.trainer.checkpoints import read_metrics

METHODS = {"blocks": (), "end to end": ("--baseline",)}
QUALITY = ("bits_per_char", "edm_loss", "frechet_small", "accuracy")
SHORT = {"dit": ("--test-images", "1000", "--frechet-images", "200")}  # under an hour; the preset's would take longer
REHEARSED, FEWEST = 10, 20  # steps of the rehearsal; fewer than the latter teach nothing
PLANNED = 0.85  # of the time: an estimate can be wrong
READ = 600  # characters of a sample that the report shows


def run(options):
    """Yield the record of each run."""
    names = ("gpt", "dit") if options.minutes < 60 else ("gpt", "dit", "vit", "mdm", "looped")
    jobs = [(name, options.preset) for name in names]
    if options.minutes >= 600 and options.preset != "tiny":
        jobs.append(("vit", "paper"))  # which has most of the time: its steps take hours
    end = time.monotonic() + options.seconds
    for i, (name, preset) in enumerate(jobs):
        share = (end - time.monotonic()) / (len(jobs) - i)
        yield from trained(name, preset, options, share)


def trained(name, preset, options, seconds):
    """Yield the records of one script's runs: first both methods by a few steps, to learn what fits into so many
    seconds; then both in earnest, all steps of the presets scaled by one factor, the schedule with them.
    """
    clock, about = time.monotonic(), {"script": name, "preset": preset}
    rehearsals = {}
    for method in METHODS:
        rehearsals[method] = attempt(rehearse, name, preset, method, options)
        if "passed" in rehearsals[method]:
            yield about | {"method": method} | rehearsals[method]
            return
    fixed, paces, full = ({m: r[k] for m, r in rehearsals.items()} for k in ("fixed", "pace", "full"))
    left = PLANNED * (seconds - (time.monotonic() - clock)) - sum(fixed.values())
    scale = min(1, left / sum(full[method] * paces[method] for method in METHODS))
    steps = {method: int(scale * full[method]) for method in METHODS}
    if min(steps.values()) < FEWEST:
        yield about | {"passed": None, "said": f"left out for time: {seconds:.0f} s are too few"}
        return
    for method in METHODS:
        yield about | {"method": method} | attempt(in_earnest, name, preset, method, options, steps[method])


def rehearse(name, preset, method, options):
    """fixed: seconds of a run besides its steps. pace: seconds of a step of all blocks. full: the preset's steps."""
    folder, clock = options.out / "runs" / "rehearsal", time.monotonic()
    full = start(name, preset, method, options, folder, REHEARSED)
    result = json.loads((folder / "result.json").read_text())
    spent = time.monotonic() - clock - REHEARSED * result["seconds_per_step_all_blocks"]
    pace, records = 0.0, read_metrics(folder, "train")
    for b in range(result["blocks"]):
        clocks = [record["seconds"] for record in records if record["block"] == b]
        pace += statistics.median(after - before for before, after in pairwise(clocks))
    shutil.rmtree(folder)
    return {"fixed": spent, "pace": pace, "full": full}


def start(name, preset, method, options, folder, steps):
    """Train by the script itself. Returns the steps that the preset would take."""
    shorter = SHORT.get(name, ()) if options.minutes < 60 and preset != "tiny" else ()
    script, settings, flags = configure(name, preset, "--device", options.device, *METHODS[method], *shorter)
    warmup = settings.warmup * steps // settings.steps
    script.main([*flags, "--steps", str(steps), "--warmup", str(warmup), "--rounds", "1", "--out", str(folder)])
    return settings.steps


def in_earnest(name, preset, method, options, steps):
    folder, clock = options.out / "runs" / f"{name}-{preset}-{method.replace(' ', '-')}", time.monotonic()
    full = start(name, preset, method, options, folder, steps)
    result = json.loads((folder / "result.json").read_text())
    text, metrics = folder / "samples.txt", result["metrics"]
    return {
        "passed": True,
        "steps": steps,
        "of": full,
        "data": result["settings"]["data"],
        "dtype": result["settings"]["dtype"],
        "quality": {metric: metrics[metric] for metric in QUALITY if metric in metrics},
        "step": result["seconds_per_step_all_blocks"],
        "seconds": time.monotonic() - clock,
        "bytes": result["memory_bytes"],
        "sample": text.read_text(encoding="utf-8")[:READ] if text.exists() else "",
        "folder": str(folder.relative_to(options.out)),
    }
