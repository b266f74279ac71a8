"""Stage 3. What does it hold? The allocator's peak of a training step beside the bytes that `plan` counts for it."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import torch

from data.images import Images
from data.text import Text
from experiments.benchmark import script_and_settings
from experiments.gpu.cases import OUT_OF_MEMORY, SCRIPTS, attempt, baseline_of, few_images
from experiments.plan import largest_network, step_bytes
from nano_db.trainer.memory import allocator_peak, training_bytes
from nano_db.trainer.run import autocast, make_optimizer

CLASSES = {"cifar10": 10, "cifar100": 100, "text8": 27, "": 50257}  # of presets whose data may not be on this machine


def run(options):
    """Yield the record of each measurement."""
    every = [(options.preset, name) for name in SCRIPTS]
    if options.preset != "tiny":
        every += [("paper", name) for name in ("dit", "vit", "mdm", "gpt", "looped")]  # large vocabularies take longest
    for preset, name in every:
        each = without_data(preset, name, options.device)
        for method, checkpointed in product(("blocks", "end to end"), (False, True)):
            about = {"preset": preset, "script": name, "method": method, "checkpointed": checkpointed}
            yield about | attempt(held, *each, method, checkpointed)


def held(script, settings, shared, method, checkpointed):
    """Bytes of a step of the largest network: as `plan` counts them, as they are counted in a true step, and the most
    that the allocator held (less what it held before).
    """
    settings = replace(settings, checkpoint_activations=checkpointed)
    settings = baseline_of(settings) if method == "end to end" else settings
    record = {"planned": step_bytes(script, settings, *shared)["total"], "batch": settings.batch_size}
    record |= {"dtype": settings.dtype} | attempt(true_step, script, settings, shared)
    if "counted" in record:
        exact = settings.device == "cpu"  # kernels of a GPU keep other tensors for the backward pass
        record |= {"passed": not exact or record["counted"] == record["planned"], "said": "the plan is wrong"}
    elif settings.device == "cuda" and record["said"] == OUT_OF_MEMORY:
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
    here = {"data": "glyphs" if images else "pydocs"} | (
        {"tokenizer": "char"} if hasattr(settings, "tokenizer") else {}
    )
    data, levels = script.prepare(few_images(replace(settings, **here)))
    if settings.data in CLASSES:
        data = (random_images if images else random_text)(CLASSES[settings.data])
    return script, settings, (data, levels)


def random_images(classes):
    labels, pixels = torch.randint(classes, (1000,)), torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8)
    return Images(pixels, labels, pixels, labels, [*map(str, range(classes))], mirrors=True, sha256="")


def random_text(classes):
    tokens = torch.randint(classes, (100_000,))
    return Text(tokens, tokens, SimpleNamespace(classes=classes), characters_per_token=1.0, sha256="")
