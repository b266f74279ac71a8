"""Stage 2. What does a step cost? All blocks beside the end-to-end network, in pairs, at the preset's size."""

import gc
import tempfile
import warnings
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmark import Contestant, take_step, time_pairs
from experiments.gpu import plain
from experiments.gpu.cases import (
    METHODS,
    OUT_OF_MEMORY,
    SCRIPTS,
    attempt,
    attempts,
    baseline_of,
    computes_bfloat16,
    configure,
    few_images,
    is_true_gpu,
    new_run,
)
from nano_db.trainer.report import seconds_of
from nano_db.trainer.run import autocast, first_weights, make_optimizer

COMPILED = ("gpt", "plain", "dit")  # compiling takes minutes
SECONDS = {"cuda": 4, "cpu": 0.5}  # of timing, for two sides
SIZES = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is the peak
WATCHED = 4  # steps in which waits and copies are counted


def run(options):
    """Yield the record of each measurement."""
    dtype = torch.bfloat16 if options.device == "cuda" and computes_bfloat16("cuda") else torch.float32
    size = SIZES[options.device]
    measured = attempt(matrix_product_peak, options.device, dtype, size)
    yield measured
    peak = measured.get("peak")
    for name in (*SCRIPTS, "plain"):
        yield from attempts({"script": name, "compiled": False}, fitting, name, options, peak)
    if not is_true_gpu(options.device):
        yield {"check": "waits, and compiled steps", "passed": None, "said": "on a GPU only"}
        return
    for name, method in product(SCRIPTS, METHODS):
        yield from attempts({"watched": name, "method": method}, waits_and_copies, name, options, *METHODS[method])
    for name in COMPILED:
        yield from attempts({"script": name, "compiled": True}, fitting, name, options, peak, "--compile")


def matrix_product_peak(device, dtype, size):
    """The FLOP/s of a large matrix product: the best that this device reaches. A data sheet's figure is higher."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    settings = SimpleNamespace(device=device)
    seconds = min([seconds_of(settings, torch.mm, a, b) for _ in range(8)][3:])  # without the first ones, for warm-up
    said = f"that of a {str(dtype)[6:]} product of two matrices of {size} x {size}"
    return {"peak": 2 * size**3 / seconds, "said": said}


def fitting(name, options, peak, *flags):
    """The record of `beside`, for a batch that is halved until both sides fit into memory."""
    own = "gpt" if name == "plain" else name
    script, settings, _ = configure(own, options.preset, "--device", options.device, *flags)
    found = attempt(beside, name, script, settings, peak)
    while found.get("said") == OUT_OF_MEMORY and settings.batch_size > 1:
        settings = replace(settings, batch_size=settings.batch_size // 2)
        found = attempt(beside, name, script, settings, peak)
    return found


def beside(name, script, settings, peak):
    """Time two sides in training: all blocks and the end-to-end network; "plain": the end-to-end GPT and a plain GPT,
    in the same training loop. Seconds per step, quartiles of their ratio in pairs, samples per second, and the share of
    `peak` that is reached.
    """
    gc.collect()  # compiled networks have reference cycles: earlier ones are still in memory
    settings = few_images(settings)
    shared, whole = script.prepare(settings), baseline_of(settings)
    pair = ((script, settings), (script, whole))
    if name == "plain":
        pair = ((script, whole), (SimpleNamespace(build=plain.build, batch=script.batch), whole))
    flops = [sum(flops_of_step(*one, shared)) for one in pair]
    both = [Contestant(*one, shared) for one in pair]
    for contestant in both:
        seconds_of(settings, contestant.train, 0)  # compiles, or loads the kernels
    seconds = sum(seconds_of(settings, contestant.train, 1) for contestant in both)
    together = max(1, min(8, round(0.5 / seconds)))  # steps that the host may queue, as it does in training
    pairs = max(3, min(20, round(SECONDS[settings.device] / (seconds * together))))
    medians, ratio = time_pairs([partial(several, contestant, together) for contestant in both], pairs, settings)
    medians, samples = [median / together for median in medians], settings.batch_size * getattr(settings, "seq_len", 1)
    return {
        "passed": True,
        "dtype": settings.dtype,
        "data": settings.data,
        "batch": settings.batch_size,
        "seconds": medians,
        "ratio": ratio,
        "per_second": [samples / median for median in medians],
        "unit": "tokens" if hasattr(settings, "seq_len") else "images",
        "utilisation": [count / median / peak for count, median in zip(flops, medians, strict=True)] if peak else [],
    }


def several(contestant, together, step):
    """Take `together` steps, which are timed as one."""
    for i in range(together):
        contestant.train(step * together + i)


def flops_of_step(script, settings, shared):
    """Yield, for each network, the floating-point operations of a forward and a backward pass: those of matrix products
    and, on CUDA, of attention.
    """
    eager = Contestant(script, replace(settings, compile=False), shared)
    for network in eager.networks:
        with FlopCounterMode(display=False) as counter, autocast(settings):
            network.loss(*script.batch(settings.batch_size, settings, *shared)).backward()
        yield counter.get_total_flops()


def waits_and_copies(name, options, *flags):
    """Count events per training step of block 0 that prints nothing (every fiftieth of a thousand prints): waits of the
    host for the GPU, and where, from PyTorch's warnings; copies between them and kernels, from its profiler.
    """
    script, settings, _ = configure(name, options.preset, "--device", options.device, *flags)
    settings = replace(few_images(settings), batch_size=8)  # the counts do not depend on it
    shared = script.prepare(settings)
    network = first_weights(script.build, 0, settings, *shared)
    optimizer = make_optimizer(network, settings)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder, warnings.catch_warnings(record=True) as waits:
        run = new_run(name, replace(settings, out=folder, steps=1000, rounds=1), shared)
        with closing(run.rounds()) as rounds, closing(run.steps(0, network, optimizer)) as steps:
            next(rounds)
            for _ in islice(steps, WATCHED):
                run.record(*take_step(script, network, optimizer, settings, shared))
            waits.clear()  # what comes before is not watched
            warnings.simplefilter("always")
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                torch.cuda.set_sync_debug_mode("warn")
                for _ in islice(steps, WATCHED):
                    run.record(*take_step(script, network, optimizer, settings, shared))
                torch.cuda.set_sync_debug_mode("default")
    on_gpu = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
    waits = [wait for wait in waits if "called a synchronizing" in str(wait.message)]
    record = {"passed": not waits, "waits": len(waits) / WATCHED}
    if on_gpu:  # some machines do not allow profiling
        record["copies"] = sum(name.startswith(("Memcpy HtoD", "Memcpy DtoH")) for name in on_gpu) / WATCHED
        record["kernels"] = sum(not name.startswith("Mem") for name in on_gpu) / WATCHED
    places = {f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits}
    return record | {"said": ", ".join(sorted(places))}
