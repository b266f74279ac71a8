"""Stage 3. What does it hold? The allocator's peak of a training step beside the bytes that `plan` counts for it."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import torch

from data.images import Images
from data.text import Text
from experiments.benchmark import script_and_settings
from experiments.gpu.cases import SCRIPTS, attempt, baseline_of, few_images
from experiments.plan import largest_network, step_bytes
from nano_db.trainer.memory import allocator_peak, training_bytes
from nano_db.trainer.run import autocast, make_optimizer

CLASSES = {"cifar10": 10, "cifar100": 100, "text8": 27, "": 50257}  # of presets whose data may not be on this machine
AGREE = 0.05


def run(options):
    """Yield the record of each measurement."""
    presets = [options.preset] if options.preset == "tiny" else [options.preset, "paper"]
    for preset, name in product(presets, SCRIPTS):
        each = without_data(preset, name, options.device)
        for method, checkpointed in product(("blocks", "end to end"), (False, True)):
            about = {"preset": preset, "script": name, "method": method, "checkpointed": checkpointed}
            yield about | attempt(held, *each, method, checkpointed)


def held(script, settings, shared, method, checkpointed):
    """Bytes of a step of the largest network: as `plan` counts them, as they are counted in a true step, and the most
    that the allocator held (less what it held before). passed: whether the first two agree.
    """
    settings = replace(settings, checkpoint_activations=checkpointed)
    settings = baseline_of(settings) if method == "end to end" else settings
    record = {"planned": step_bytes(script, settings, *shared)["total"], "batch": settings.batch_size}
    record |= {"dtype": settings.dtype} | attempt(true_step, script, settings, shared)
    if "counted" in record:
        record["passed"] = abs(record["counted"] / record["planned"] - 1) < AGREE
    elif settings.device == "cuda" and record["said"] == "out of memory":
        record |= {"passed": None, "said": "does not fit into this GPU"}
    return record


def true_step(script, settings, shared):
    before = torch.cuda.memory_allocated() if settings.device == "cuda" else 0
    network, batch = largest_network(script, settings, *shared)
    optimizer, context = make_optimizer(network, settings), autocast(settings)
    record = {"counted": training_bytes(network, batch, optimizer, context)["total"]}
    if settings.device == "cuda":
        record["peak"] = allocator_peak(network, batch, optimizer, context) - before
    return record


def without_data(preset, name, device):
    """(script, settings, shared) with random data of the right shape, for a preset's own may have to be downloaded."""
    script, settings = script_and_settings(name, ["--preset", preset, "--device", device])
    images = hasattr(settings, "patch")
    drawn = (
        {"data": "glyphs"} if images else {"data": "pydocs"} | ({"tokenizer": "char"} if settings.data == "" else {})
    )
    data, levels = script.prepare(few_images(replace(settings, **drawn)))
    if count := CLASSES.get(settings.data):
        labels = torch.zeros(2 * settings.batch_size, dtype=torch.long)
        pixels = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
        tokens = torch.randint(count, (100_000,))
        data = (
            Images(pixels, labels, pixels, labels, [*map(str, range(count))], True, "")
            if images
            else Text(tokens, tokens, SimpleNamespace(classes=count), 1.0, "")
        )
    return script, settings, (data, levels)
