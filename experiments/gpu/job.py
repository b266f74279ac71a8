"""Stage 4. The main job: blocks and the end-to-end network, trained by the scripts for as long as the time allows."""

import json
import re
import shutil
import statistics
import time
from itertools import pairwise

from data import cifar
from experiments.gpu.cases import OUT_OF_MEMORY, attempt, configure
from nano_db.trainer.checkpoints import read_metrics

METHODS = {"blocks": (), "end to end": ("--baseline",)}
OF_THE_PAPER = METHODS | {
    "blocks, paper's recipe": ("--recipe", "paper")
}  # which reports 59.30%, and end to end 60.25%
QUALITY = ("bits_per_char", "edm_loss", "frechet_small", "accuracy")
SHORT = {"dit": ("--test-images", "1000", "--frechet-images", "200")}  # under an hour; the preset's would take longer
REHEARSED, FEWEST = 10, 20  # steps of the rehearsal; fewer than the latter teach nothing
PLANNED = 0.85  # of the time: an estimate can be wrong
READ = 600  # characters of a sample that the report shows


def run(options):
    """Yield the record of each run."""
    names = ("gpt", "dit") if options.minutes < 60 else ("gpt", "dit", "vit", "mdm", "looped")
    jobs = [(name, options.preset, METHODS) for name in names]
    if options.minutes >= 600 and options.preset != "tiny":
        if cifar.is_here("cifar100"):
            jobs.append(("vit", "paper", OF_THE_PAPER))
        else:
            said = "left out: python train_vit.py --preset paper downloads CIFAR-100, this command does not"
            yield {"script": "vit", "preset": "paper", "passed": None, "said": said}
    end = time.monotonic() + options.seconds
    for i, (name, preset, methods) in enumerate(jobs):
        share = (end - time.monotonic()) / (len(jobs) - i)
        yield from trained(name, preset, methods, options, share)


def trained(name, preset, methods, options, seconds):
    """Yield the records of one script's runs: first each method by a few steps, to learn how many fit into so many
    seconds; then all in earnest, the steps of the preset scaled by one factor, the schedule with them.
    """
    clock, about, plans = time.monotonic(), {"script": name, "preset": preset}, {}
    for method in methods:
        found = rehearse(name, preset, methods[method], options)
        if "pace" in found:
            plans[method] = found
        else:
            yield about | {"method": method} | found
    left = PLANNED * (seconds - (time.monotonic() - clock)) - sum(plan["fixed"] for plan in plans.values())
    scale = min(1.0, left / (sum(plan["full"] * plan["pace"] for plan in plans.values()) or 1.0))
    for method, plan in plans.items():
        steps = int(scale * plan["full"])
        if steps < FEWEST:
            found = {"passed": None, "said": f"left out for time: {seconds:.0f} s are too few"}
        else:
            folder = options.out / "runs" / re.sub(r"\W+", "-", f"{name} {preset} {method}")
            found = attempt(in_earnest, name, preset, plan["flags"], options, folder, steps)
        yield about | {"method": method} | found


def rehearse(name, preset, flags, options):
    """The record of a failure, or fixed: seconds of a run besides its steps; pace: seconds of a step of all blocks;
    full: the preset's steps; flags: those given, with what the run needs to fit into the memory.
    """
    for more in ((), ("--checkpoint-activations",)):
        found = attempt(paced, name, preset, (*flags, *more), options)
        if found.get("said") != OUT_OF_MEMORY:
            break
    return found


def paced(name, preset, flags, options):
    folder, clock = options.out / "runs" / "rehearsal", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    full, result = start(name, preset, flags, options, folder, REHEARSED)
    fixed = time.monotonic() - clock - REHEARSED * result["seconds_per_step_all_blocks"]
    pace, records = 0.0, read_metrics(folder, "train")
    for b in range(result["blocks"]):
        clocks = [record["seconds"] for record in records if record["block"] == b]
        pace += statistics.median(after - before for before, after in pairwise(clocks))
    shutil.rmtree(folder)
    return {"fixed": fixed, "pace": pace, "full": full, "flags": flags}


def start(name, preset, flags, options, folder, steps):
    """Train by the script itself. Returns the steps that the preset would take, and what is in result.json."""
    shorter = SHORT.get(name, ()) if options.minutes < 60 and preset != "tiny" else ()
    script, settings, flags = configure(name, preset, "--device", options.device, *shorter, *flags)
    warmup = settings.warmup * steps // settings.steps
    script.main([*flags, "--steps", str(steps), "--warmup", str(warmup), "--rounds", "1", "--out", str(folder)])
    return settings.steps, json.loads((folder / "result.json").read_text())


def in_earnest(name, preset, flags, options, folder, steps):
    clock = time.monotonic()
    full, result = start(name, preset, flags, options, folder, steps)
    text, metrics = folder / "samples.txt", result["metrics"]
    return {
        "passed": True,
        "steps": steps,
        "of": full,
        "flags": flags,
        "data": result["settings"]["data"],
        "dtype": result["settings"]["dtype"],
        "quality": {metric: metrics[metric] for metric in QUALITY if metric in metrics},
        "step": result["seconds_per_step_all_blocks"],
        "seconds": time.monotonic() - clock,
        "bytes": result["memory_bytes"],
        "sample": text.read_text(encoding="utf-8")[:READ] if text.exists() else "",
        "folder": str(folder.relative_to(options.out)),
    }
