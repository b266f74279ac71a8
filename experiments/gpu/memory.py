"""Stage 3. How much memory does a step take? The allocator's peak, compared with the bytes that `plan` counts."""

import gc
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import torch

from data.images import Images
from data.text import Text
from experiments.benchmark import script_and_settings
from experiments.gpu.cases import (
    METHODS,
    OUT_OF_MEMORY,
    SCRIPTS,
    attempt,
    attempts,
    baseline_of,
    few_images,
    is_true_gpu,
    warm_up,
)
from experiments.plan import largest_network, step_bytes
from nano_db.trainer.memory import allocator_peak, training_bytes
from nano_db.trainer.run import autocast, make_optimizer

CLASSES = {"cifar10": 10, "cifar100": 100, "text8": 27, "": 50257}  # of data that may be missing; "": GPT-2's


def run(options):
    """Yield the record of each measurement."""
    every = [(options.preset, name) for name in SCRIPTS]
    if options.preset != "tiny":
        every += [("paper", name) for name in ("dit", "vit", "mdm", "gpt", "looped")]  # large vocabularies take longest
    for preset, name in every:
        about, found = {"script": name, "preset": preset}, attempt(without_data, preset, name, options.device)
        if "passed" in found:
            yield about | found
            continue
        for method, checkpointed in product(METHODS, (False, True)):
            record = about | {"method": method, "checkpointed": checkpointed}
            yield from attempts(record, step_held, *found.values(), method, checkpointed)


def step_held(script, settings, shared, method, checkpointed):
    """Bytes of a step of the largest network: as `plan` counts them, as counted in a real step, and the allocator's
    peak minus what it held before. GPU kernels keep different tensors for the backward pass than the CPU kernels with
    which `plan` counts, and autocast rounds different ones. So the counts must agree only on a CPU.
    """
    settings = replace(settings, checkpoint_activations=checkpointed)
    settings = baseline_of(settings) if method == "end to end" else settings
    record = {"planned": step_bytes(script, settings, *shared)["total"], "batch": settings.batch_size}
    record |= {"dtype": settings.dtype} | attempt(true_step, script, settings, shared)
    if "counted" in record:
        agree = record["counted"] == record["planned"]
        record |= {"passed": True} if agree or settings.device != "cpu" else {"passed": False, "said": "counts differ"}
    elif settings.device == "cuda" and record["said"] == OUT_OF_MEMORY:
        record |= {"passed": None, "said": "does not fit on this GPU"}
    return record


def true_step(script, settings, shared):
    on_gpu, before = is_true_gpu(settings.device), 0
    if on_gpu:
        gc.collect()  # what an earlier network may have left
        warm_up(settings.device)
        script.batch(settings.batch_size, settings, *shared)  # moves the data to the GPU
        before = torch.cuda.memory_allocated()
    network, batch = largest_network(script, settings, *shared)
    optimizer, context = make_optimizer(network, settings), autocast(settings)
    record = {"counted": training_bytes(network, batch, optimizer, context)["total"]}
    if on_gpu:
        record["peak"] = allocator_peak(network, batch, optimizer, context) - before
    return record


def without_data(preset, name, device):
    """The script, settings, and shared: random data of the right shape, because the preset's may need a download."""
    script, settings = script_and_settings(name, ["--preset", preset, "--device", device])
    images = hasattr(settings, "patch")
    here = {"data": "glyphs" if images else "pydocs"}
    if hasattr(settings, "tokenizer"):
        here["tokenizer"] = "char"
    data, levels = script.prepare(few_images(replace(settings, **here)))
    if settings.data in CLASSES:
        data = (random_images if images else random_text)(CLASSES[settings.data])
    return {"script": script, "settings": settings, "shared": (data, levels)}


def random_images(classes):
    labels, pixels = torch.randint(classes, (1000,)), torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8)
    return Images(pixels, labels, pixels, labels, [*map(str, range(classes))], mirrors=True, sha256="")


def random_text(classes):
    tokens = torch.randint(classes, (100_000,))
    return Text(tokens, tokens, SimpleNamespace(classes=classes), characters_per_token=1.0, sha256="")
