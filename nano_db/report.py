"""The end of a run: what it cost, in bytes and seconds, and result.json."""

from nano_db.device import autocast
from nano_db.memory import memory_table, peak_resident_bytes, training_bytes
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
    stands beside."""
    settings = trainer.settings
    peak = peak_resident_bytes()  # before anything end-to-end is built
    states = [trainer.run.load_block(b) for b in range(trainer.networks)]
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
        "peak_resident_bytes": peak,
        "device": trainer.device,
    }
    columns = {"one block" if settings.method == "blocks" else "baseline": largest}
    if settings.method == "blocks":
        columns["end to end"] = result["baseline_memory_bytes"] = count_training_bytes(trainer, make_baseline())
    trainer.run.finish(result)
    print("\nbytes to train, by part:", *memory_table(columns), sep="\n  ")
    return result
