"""What training costs, in bytes and seconds: at the end of a run, with result.json, or as a benchmark without a run."""

import statistics
import time

import torch

from nano_db.device import autocast
from nano_db.memory import memory_table, training_bytes
from nano_db.optimizer import make_optimizer


def count_training_bytes(trainer, module):
    """Bytes by part of one training step of `module`, a fresh one of which nothing is kept (see memory.py)."""
    module = module.to(trainer.device).train()
    optimizer = make_optimizer(module, trainer.settings)
    return training_bytes(module, trainer.batch(), optimizer, autocast(trainer.settings, trainer.device))


def finish(script, trainer, metrics, make_baseline):
    """Write result.json, print the memory table, and return the result.

    metrics: the script's own. make_baseline(): the end-to-end network of the same settings, to measure beside the
    blocks. memory_bytes and seconds_per_step are the largest block's (or the baseline's); the sum over the blocks
    stands beside.
    """
    settings = trainer.settings
    states = [trainer.run.load_block(b, whole=False) for b in range(trainer.networks)]
    seconds = [state["seconds"] / state["step"] for state in states]
    counts = [count_training_bytes(trainer, trainer.build(b)) for b in range(trainer.networks)]
    largest = max(counts, key=lambda count: count["total"])
    result = {
        "script": script,
        "method": settings.method,
        "blocks": trainer.networks,
        "steps": settings.steps,
        "seed": settings.seed,
        "parameters": sum(p.numel() for b in range(trainer.networks) for p in trainer.build(b).parameters()),
        "metrics": metrics,
        "memory_bytes": largest,
        "seconds_per_step": max(seconds),
        "seconds_per_step_all_blocks": sum(seconds),
        "peak_resident_bytes": trainer.peak_resident or trainer.run.result().get("peak_resident_bytes"),
        "device": trainer.device,
    }
    columns = {"one block" if settings.method == "blocks" else "baseline": largest}
    if settings.method == "blocks":
        columns["end to end"] = result["baseline_memory_bytes"] = count_training_bytes(trainer, make_baseline())
    trainer.run.finish(result)
    print("\nbytes to train, by part:", *memory_table(columns), sep="\n  ")
    return result


def benchmark(trainer, make_baseline, pairs):
    """Print the memory table, and the seconds of one step of every block against one step of the baseline.

    Timings drift with the machine, so both take turns, and what counts is the ratio within each pair.
    """
    baseline = make_baseline().to(trainer.device).train()
    blocks = [trainer.build(b).train() for b in range(trainer.networks)]
    optimizers = [make_optimizer(module, trainer.settings) for module in (*blocks, baseline)]

    def seconds(modules, optimizers, step):
        clock = time.perf_counter()
        for b, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            trainer.step(module, optimizer, b, step)
        if trainer.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - clock

    times = []
    for pair in range(pairs + 2):
        times.append((seconds(blocks, optimizers[:-1], pair), seconds([baseline], optimizers[-1:], pair)))
    ours, theirs = zip(*times[2:], strict=True)  # the first two warm up
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    print(
        f"a step of all {len(blocks)} blocks {1000 * statistics.median(ours):.1f} ms, of the baseline "
        f"{1000 * statistics.median(theirs):.1f} ms; ratio in pairs {middle:.3f} (quartiles {low:.3f}, {high:.3f})"
    )
    counts = [count_training_bytes(trainer, module) for module in (*blocks, baseline)]
    largest = max(counts[:-1], key=lambda count: count["total"])
    print("bytes to train, by part:", *memory_table({"one block": largest, "end to end": counts[-1]}), sep="\n  ")
