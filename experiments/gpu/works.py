"""Stage 1. Does it work? Tiny runs of every script on the device, compared with the CPU and with each other."""

import io
import json
import math
import re
import warnings
import weakref
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from experiments.benchmark import script_named
from experiments.gpu.cases import (
    ALL_METHODS,
    PAPER,
    SCRIPTS,
    attempt,
    attempts,
    computes_bfloat16,
    configure,
    ensure,
    is_true_gpu,
    new_run,
    train,
)
from nano_db.trainer.checkpoints import read_block, read_metrics
from nano_db.trainer.command import command
from nano_db.trainer.run import autocast, first_weights, networks, seed_from

LENGTH, STOP = ("--steps", "6", "--warmup", "2"), 3  # of a run; the step after which one is stopped
# Relative differences that rounding may make:
LOSS, GRADIENT = {"float32": 1e-4, "bfloat16": 2e-2}, {"float32": 1e-3, "bfloat16": 1e-1}
BOUND, COMPILED = 1e-2, 1e-3


@dataclass(frozen=True)
class Case:
    """A script with a method and a dtype. shared: what its prepare returned. folder: for its runs."""

    name: str
    method: str
    dtype: str
    device: str
    folder: Path
    script: ModuleType
    shared: tuple[Any, ...]

    def flags(self):
        return [*LENGTH, "--device", self.device, *ALL_METHODS[self.method]]

    def settings(self, folder="", **changes):
        _, settings, _ = configure(self.name, "tiny", *self.flags(), "--dtype", self.dtype)
        return replace(settings, out=str(self.folder / folder), **changes)

    def run(self, folder, **changes):
        return new_run(self.name, self.settings(folder, **changes), self.shared)


def cases(device, dtypes, folder):
    """Yield the Cases of all scripts and methods; for those that cannot even be prepared, the record of the failure."""
    for name, method in product(SCRIPTS, ALL_METHODS):
        if method == PAPER and not hasattr(script_named(name).Settings, "recipe"):
            continue
        found = attempt(prepared, name, method, device)
        if "passed" in found:
            yield {"check": "prepared", "case": f"{name}, {method}"} | found
            continue
        for dtype in dtypes:
            yield Case(name, method, dtype, device, Path(folder, f"{name} {method} {dtype}"), **found)


def prepared(name, method, device):
    script, settings, _ = configure(name, "tiny", "--device", device, *ALL_METHODS[method])
    return {"script": script, "shared": script.prepare(settings)}


def run(options):
    """Yield the record of each check, and before it a text that says what is checked."""
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    dtypes = ("float32", "bfloat16") if computes_bfloat16(options.device) else ("float32",)
    if len(dtypes) == 1:
        yield {"check": "bfloat16", "case": options.device, "passed": None, "said": "not supported by this device"}
    found = list(cases(options.device, dtypes, options.scratch))
    yield from (record for record in found if not isinstance(record, Case))
    every = [case for case in found if isinstance(case, Case)]
    exact = [case for case in every if case.dtype == "float32"]
    for case in every:
        yield from check("loss and gradient of a step, against the CPU in float32", case, step_difference)
    for case in exact:
        if case.method == "blocks":
            yield from check("begun on the CPU, finished here", case, finished_elsewhere)
    for case in exact[:1]:  # one is enough, here and below: all scripts share this code
        if is_true_gpu(case.device):
            yield from check("out of memory gives one line", case, out_of_memory)
        else:
            yield {"check": "out of memory gives one line", "case": case.name, "passed": None, "said": "on a GPU only"}
    for case in every:
        yield from check("stopped and resumed, against a run that was not", case, resumed_difference)
    for case in exact if len(dtypes) == 2 else ():
        if case.name != "vit":  # it has accuracies, and no bound
            yield from check("bound in bfloat16, against float32", case, bound_difference)
    for case in exact[:1]:
        yield from check("compiled, against eager", case, compiled_difference)


def check(what, case, measure):
    """Yield what is checked, and the record. measure(case) returns a relative difference, its limit, and a note."""
    yield from attempts({"check": what, "case": f"{case.name}, {case.method}, {case.dtype}"}, judge, case, measure)


def judge(case, measure):
    difference, limit, said = measure(case)
    ensure(math.isfinite(difference), f"the difference is {difference}")
    return {"passed": difference <= limit, "difference": difference, "limit": limit, "said": said}


# --- the checks ---


class DrawnOnCPU(TorchFunctionMode):
    """Draws all noise on the CPU and moves it: a GPU's generator gives other numbers for the same seed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.rand, torch.randn, torch.randint):
            device = kwargs.pop("device", None)
            return function(*args, **kwargs).to(device or "cpu")
        if function is torch.randn_like:
            (like,) = args
            return torch.randn(like.shape, dtype=like.dtype).to(like.device)
        return function(*args, **kwargs)


def first_step(case, **changes):
    """The loss of the first step of each network, and its gradient as one vector. Weights, batch and noise are those of
    the CPU.
    """
    settings, losses, gradients = case.settings(**changes), [], []
    for b in range(networks(settings)):
        network = first_weights(case.script.build, b, settings, *case.shared)
        perturb(network, b)
        seed_from(0, b, 0)
        with DrawnOnCPU(), autocast(settings):
            loss = network.loss(*case.script.batch(settings.batch_size, settings, *case.shared))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).cpu())
    return losses, gradients


def perturb(network, seed):
    """Add noise to the weights: many are zero at first, so most of the network would go untested."""
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data += 0.1 * noise.to(parameter.device)


def step_difference(case):
    """The difference of the losses. That of the gradients is checked here, with its own limit."""
    (losses, gradients), found = first_step(case, device="cpu", dtype="float32"), first_step(case)
    ensure(case.dtype == "float32" or found[0] != losses, "bfloat16 changes nothing")
    for expected, gradient in zip(gradients, found[1], strict=True):
        away, limit = float((gradient - expected).norm() / expected.norm()), GRADIENT[case.dtype]
        ensure(away <= limit, f"the gradient is {away:.1e} away from the CPU's, limit {limit:.0e}")
    return largest(losses, found[0]), LOSS[case.dtype], ""


def resumed_difference(case):
    """The difference in weights and AdamW's averages at the end of a run, with and without a stop on the way."""
    train(case.run("whole"), case.script, case.shared)
    with suppress(KeyboardInterrupt):
        train(case.run("halted"), case.script, case.shared, stop_after=STOP)
    run = case.run("halted")
    ensure(run.step_of(0) == STOP + 1, f"stopped after {STOP + 1} steps, it resumes at step {run.step_of(0)}")
    train(run, case.script, case.shared)
    for path in run.folder.glob("metrics_*.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
        ensure(steps == sorted(set(steps)), f"{path.name}: the resumed run took these steps: {steps}")
    difference = distance(case.folder / "whole", run.folder)
    if not difference:
        return 0.0, 0.0, "bit for bit"
    noise = 0.0
    for again in ("again", "and again", "once more"):  # one difference of rounding may happen to be small
        if difference > 10 * noise:
            train(case.run(again), case.script, case.shared)
            noise = max(noise, distance(case.folder / "whole", case.folder / again))
    said = f"as close as two runs without a stop; not deterministic: {changing_operations(case)}"
    return difference, max(10 * noise, 1e-5), said


def changing_operations(case):
    """Names of the operations of a step whose kernels on this device do not always give the same bits. (PyTorch also
    warns of cuBLAS, which differs only where several streams share it.)
    """
    settings = case.settings()
    network = first_weights(case.script.build, 0, settings, *case.shared)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught, autocast(settings):
            warnings.simplefilter("always")
            network.loss(*case.script.batch(settings.batch_size, settings, *case.shared)).backward()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_warn_always(False)
    named = [re.match("(.*?) (?:does not have a|defaults to a non-)", str(w.message)) for w in caught]
    return ", ".join(sorted({found[1] for found in named if found})) or "nothing that PyTorch names"


def bound_difference(case):
    """Evaluate a trained run, its weights perturbed, in both dtypes: the bound, and each block's share of it."""
    run, changes = case.run("whole"), {"eval_only": True, "samples": 0}
    train(run, case.script, case.shared)  # does nothing if the run is finished, here and below
    changes |= {"frechet_images": 0} if case.name == "dit" else {}
    trained, scores = run.trained_blocks(case.script.build, *case.shared), {}
    for b, network in enumerate(trained):
        perturb(network, b)
    for dtype in ("float32", "bfloat16"):
        metrics = case.script.evaluate(case.run("whole", dtype=dtype, **changes), trained, *case.shared)
        shares = metrics.get("nats_per_block") or metrics["edm_loss_by_block"]
        scores[dtype] = torch.tensor([*shares, sum(shares)], dtype=torch.float64)
    exact, rounded = scores.values()
    ensure(not exact.equal(rounded), "bfloat16 changes nothing")
    return float((rounded - exact).abs().max() / exact[-1].abs()), BOUND, ""


def finished_elsewhere(case):
    """A run that has begun on the CPU, finished on the device by the script itself, with evaluation and report."""
    begun = replace(case.settings("moved"), device="cpu")
    with suppress(KeyboardInterrupt):
        train(new_run(case.name, begun, case.shared), case.script, case.shared, stop_after=STOP)
    code, said = outcome(case, "moved")
    ensure(code == 0, said.strip())
    result = json.loads((case.folder / "moved" / "result.json").read_text(encoding="utf-8"))
    computed = result["device"], result["settings"]["dtype"]
    ensure(computed == (case.device, "float32"), f"it was finished on {computed}")
    return 0.0, 0.0, ""


def out_of_memory(case):
    """What the script says if the GPU grants no memory, and the network is too large for its cache."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        code, said = outcome(case, "large", "--width", "1024")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    errors = [line for line in said.splitlines() if "error" in line.lower()]  # there may be warnings, too
    right = code == 2 and len(errors) == 1 and ": error: out of memory: " in errors[0] and "Traceback" not in said
    ensure(right, f"exit code {code}: {said}")
    return 0.0, 0.0, errors[0]


def compiled_difference(case):
    """The last loss of a run with --compile. Each network must have been freed before the next one was built."""
    built = []

    def build(b, *shared):
        ensure(not any(network() for network in built), "a network was built while another was in memory")
        module = case.script.build(b, *shared)
        built.append(weakref.ref(module.network))
        return module

    train(case.run("whole"), case.script, case.shared)
    train(case.run("compiled", compile=True), SimpleNamespace(build=build, batch=case.script.batch), case.shared)
    eager, compiled = (last_losses(case.folder / name) for name in ("whole", "compiled"))
    return largest(eager, compiled), COMPILED, ""


# --- what they share ---


def outcome(case, folder, *more):
    """(exit code, stderr) of the script itself."""
    flags = ["--preset", "tiny", *case.flags(), "--out", str(case.folder / folder), *more]
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            command(partial(case.script.main, flags))
    except SystemExit as stop:
        return stop.code, errors.getvalue()
    return 0, errors.getvalue()


def largest(expected, found):
    """The largest relative difference of two lists of numbers."""
    expected, found = (torch.tensor(numbers, dtype=torch.float64) for numbers in (expected, found))
    return float(((found - expected) / expected).abs().max())  # NaN, if one of them is


def distance(first, second):
    """The relative distance between all numbers that two runs have learned; 0.0 if they agree bit for bit."""
    numbers = [torch.cat([t.double().flatten() for t in learned(folder)]) for folder in (first, second)]
    return 0.0 if torch.equal(*numbers) else float((numbers[0] - numbers[1]).norm() / numbers[0].norm())


def learned(folder):
    for path in sorted(folder.glob("block_*.pt")):
        state = read_block(path)
        yield from state["weights"].values()
        yield from (tensor for moments in state["optimizer"]["state"].values() for tensor in moments.values())


def last_losses(folder):
    return [record["loss"] for record in read_metrics(folder, "train") if record["step"] == int(LENGTH[1])]
