"""What training costs, in bytes and seconds: at the end of a run, with result.json, or as a benchmark without a run."""

import statistics
from functools import partial

from nano_db.device import autocast
from nano_db.inference import cost_of_use, cost_table, seconds_of
from nano_db.layers import checkpoint_layers
from nano_db.memory import memory_table, training_bytes
from nano_db.optimizer import make_optimizer


def count_training_bytes(trainer, module):
    """Bytes by part of one training step of `module`, a fresh one of which nothing is kept (see memory.py)."""
    module = module.to(trainer.device).train()
    checkpoint_layers(module, trainer.settings.checkpoint_activations)
    optimizer = make_optimizer(module, trainer.settings)
    return training_bytes(module, trainer.batch(), optimizer, autocast(trainer.settings, trainer.device))


def finish(script, trainer, metrics, make_baseline, use=None):
    """Write result.json, print the memory table, and return the result.

    metrics: the script's own. make_baseline(): the end-to-end network of the same settings, to measure beside the
    blocks. memory_bytes and seconds_per_step are the largest block's (or the baseline's); the sum over the blocks
    stands beside. use: see inference.cost_of_use; the cost of one sample is reported, too.
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
    print("\nbytes to train, by part:", *memory_table(columns), sep="\n  ")
    if use:
        costs = {name: cost_of_use(networks, use, trainer.device) for name, networks in to_use(trainer, make_baseline)}
        result["one_sample"] = costs[settings.method]
        print("to use:", *cost_table(costs), sep="\n  ")
    trainer.run.finish(result)
    return result


def to_use(trainer, make_baseline):
    """Yield (name, networks): those of the run and, beside blocks, the end-to-end network. What they cost does not
    depend on their weights, so these are the first ones.
    """
    yield trainer.settings.method, [trainer.build(b).eval() for b in range(trainer.networks)]
    if trainer.settings.method == "blocks":
        yield "end to end", [make_baseline().to(trainer.device).eval()]


def benchmark(trainer, make_baseline, pairs, use=None):
    """Print the memory table, and the seconds of one step of every block against one step of the baseline; also, where
    there is a `use` (inference.cost_of_use), what a sample costs.

    Timings drift with the machine, so both take turns, and what counts is the ratio within each pair.
    """
    baseline = make_baseline().to(trainer.device).train()
    checkpoint_layers(baseline, trainer.settings.checkpoint_activations)
    blocks = [trainer.build(b).train() for b in range(trainer.networks)]
    optimizers = [make_optimizer(module, trainer.settings) for module in (*blocks, baseline)]

    def steps(modules, optimizers, pair):
        for b, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            trainer.step(module, optimizer, b, pair)

    def ours(pair):
        steps(blocks, optimizers[:-1], pair)

    def theirs(pair):
        steps([baseline], optimizers[-1:], pair)

    _print_pairs(f"a step of all {len(blocks)} blocks", ours, theirs, pairs, trainer.device)
    counts = [count_training_bytes(trainer, module) for module in (*blocks, baseline)]
    largest = max(counts[:-1], key=lambda count: count["total"])
    print("bytes to train, by part:", *memory_table({"one block": largest, "end to end": counts[-1]}), sep="\n  ")
    if use:
        (_, blocks), (_, baseline) = to_use(trainer, make_baseline)
        costs = {
            "blocks": cost_of_use(blocks, use, trainer.device),
            "end to end": cost_of_use(baseline, use, trainer.device),
        }
        print("to use:", *cost_table(costs), sep="\n  ")
        _print_pairs(
            "16 samples with blocks", lambda _: use(blocks, 16), lambda _: use(baseline, 16), pairs, trainer.device
        )


def _print_pairs(label, ours, theirs, pairs, device):
    """Time ours(pair) and theirs(pair), in turns, and print medians and the ratio; the first two pairs warm up."""
    times = [[seconds_of(partial(side, i), device) for side in (ours, theirs)] for i in range(pairs + 2)][2:]
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    ours, theirs = (1000 * statistics.median(side) for side in zip(*times, strict=True))
    print(
        f"{label} {ours:.1f} ms, end to end {theirs:.1f} ms; ratio in pairs {middle:.3f} "
        f"(quartiles {low:.3f}, {high:.3f})"
    )
