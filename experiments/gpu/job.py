"""Stage 4. Training runs: the scripts train blocks and the end-to-end network for as long as the time allows."""

import json
import math
import re
import shutil
import statistics
import time
from itertools import pairwise

from data import cifar
from experiments.gpu.cases import ALL_METHODS, METHODS, OUT_OF_MEMORY, SCRIPTS, attempt, configure, ensure, warm_up
from experiments.gpu.report import QUALITY
from nano_db.trainer.checkpoints import read_metrics

# Flags for an evaluation, the most thorough first, and how many training steps would take as long. The DiT's takes
# longest: it evaluates an image at 24 noise levels, and samples others in 50 steps with guidance.
EVALUATIONS = {
    "dit": (
        ((), 770),
        (("--test-images", "1000", "--frechet-images", "200"), 62),
        (("--test-images", "200", "--frechet-images", "0", "--samples", "10"), 8),
    ),
    "gpt": (((), 30), (("--eval-windows", "64"), 0)),
}
USUAL = (((), 0),)
UNWRITTEN = {"gpt": ("--samples", "0")}  # in the rehearsal, as the report measures what a token costs
REHEARSED, FEWEST = 10, 20  # steps of the rehearsal; minimum steps of a run that can learn anything
PLANNED, EVALUATING = 0.85, 0.2  # of the time left: for the runs, as estimates can be wrong; for their evaluation
READ = 600  # characters of a sample that the report shows


def run(options):
    """Yield the record of each run."""
    names = SCRIPTS[:2] if options.minutes < 60 else SCRIPTS
    jobs = [(name, options.preset, METHODS) for name in names]
    if options.minutes >= 600 and options.preset != "tiny":
        if cifar.is_here("cifar100"):
            jobs.append(("vit", "paper", ALL_METHODS))
        else:
            said = "CIFAR-100 is missing: python train_vit.py --preset paper downloads it"
            yield {"script": "vit", "preset": "paper", "passed": None, "said": said}
    end = time.monotonic() + options.seconds
    warm_up(options.device)  # what a process does once must not count as a part of each run
    for i, (name, preset, methods) in enumerate(jobs):
        share = (end - time.monotonic()) / (len(jobs) - i)
        yield from trained(name, preset, methods, options, share)


def trained(name, preset, methods, options, seconds):
    """Yield the records of one script's runs: first a few steps of each method, to estimate how many fit into
    `seconds`; then the real runs, for the preset's steps, and their schedule, scaled by one factor.
    """
    clock, about, plans = time.monotonic(), {"script": name, "preset": preset}, {}
    evaluations = EVALUATIONS.get(name, USUAL) if preset != "tiny" else USUAL
    quickly, _ = evaluations[-1]
    for method, flags in methods.items():
        yield f"{name}, preset {preset}, {method}: rehearsal"
        found = rehearse(name, preset, (*flags, *quickly, *UNWRITTEN.get(name, ())), options)
        if "pace" in found:
            plans[method] = found
        else:
            yield about | {"method": method} | found
    if not plans:
        return
    left = PLANNED * (seconds - (time.monotonic() - clock)) - sum(plan["fixed"] for plan in plans.values())
    paces = sum(plan["pace"] for plan in plans.values())
    affordable = (each for each in evaluations if each[1] * paces <= EVALUATING * left)
    thorough, length = next(affordable, evaluations[-1])
    scale = (left - length * paces) / sum(plan["full"] * plan["pace"] for plan in plans.values())
    for method, plan in plans.items():
        steps, over = int(min(1.0, scale) * plan["full"]), time.monotonic() - clock
        if steps < min(FEWEST, plan["full"]) or seconds - over < plan["fixed"] + steps * plan["pace"]:
            found = {"passed": None, "said": f"needs more than the {seconds:.0f} s that are left for it"}
        else:
            folder = options.out / "runs" / re.sub(r"\W+", "-", f"{name} {preset} {method}")
            flags = (*methods[method], *plan["saving"], *thorough)
            yield f"{name}, preset {preset}, {method}: {steps} steps"
            found = attempt(in_earnest, name, preset, flags, options, folder, steps)
        yield about | {"method": method} | found


def rehearse(name, preset, flags, options):
    """The record of a failure, or fixed: seconds of a run besides its steps; pace: seconds of a step of all blocks;
    full: the preset's steps; saving: flags without which the run does not fit into memory.
    """
    for saving in ((), ("--checkpoint-activations",)):
        found = attempt(paced, name, preset, (*flags, *saving), options)
        if found.get("said") != OUT_OF_MEMORY:
            break
    return found | {"saving": saving}


def paced(name, preset, flags, options):
    folder, clock = options.scratch / "rehearsal", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)  # of a run that ran out of memory
    settings, result = start(name, preset, flags, options, folder, REHEARSED)
    fixed = time.monotonic() - clock - REHEARSED * result["seconds_per_step_all_blocks"]
    if name in UNWRITTEN:
        fixed += settings.sample_length * result["one_sample"]["seconds"]  # of 16 tokens, in a batch of 16
    pace, records = 0.0, read_metrics(folder, "train")
    for b in range(result["blocks"]):
        clocks = [record["seconds"] for record in records if record["block"] == b]  # of ten steps, each is logged
        pace += statistics.median(after - before for before, after in pairwise(clocks))
    return {"fixed": fixed, "pace": pace, "full": settings.steps}


def start(name, preset, flags, options, folder, steps):
    """Train with the script itself. Returns the settings of the preset, and the content of result.json."""
    script, settings, flags = configure(name, preset, "--device", options.device, *flags)
    script.main([*flags, "--steps", str(steps), "--rounds", "1", "--out", str(folder)])  # fewer steps, shorter warm-up
    return settings, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def in_earnest(name, preset, flags, options, folder, steps):
    clock = time.monotonic()
    settings, result = start(name, preset, flags, options, folder, steps)
    text, metrics = folder / "samples.txt", result["metrics"]
    quality = {name: metrics[name] for name in QUALITY if name in metrics}
    ensure(all(map(math.isfinite, quality.values())), f"the run ended with {quality}")
    return {
        "passed": True,
        "steps": steps,
        "of": settings.steps,
        "flags": flags,
        "data": result["settings"]["data"],
        "dtype": result["settings"]["dtype"],
        "quality": quality,
        "step": result["seconds_per_step_all_blocks"],
        "seconds": time.monotonic() - clock,
        "bytes": result["memory_bytes"],
        "sample": text.read_text(encoding="utf-8")[:READ] if text.exists() else "",
        "folder": str(folder.relative_to(options.out)),
    }
