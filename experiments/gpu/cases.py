"""What the stages share: scripts with their methods, data that needs no network, and the training loop of a script."""

import gc
import signal
import textwrap
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import cifar
from experiments.benchmark import script_and_settings, script_named, take_step
from nano_db.errors import is_out_of_memory
from nano_db.partition import Partition
from nano_db.trainer.report import end_to_end
from nano_db.trainer.run import Run, first_weights, make_optimizer, noise_identity

SCRIPTS = ("gpt", "dit", "vit", "mdm", "looped")  # those that a user is most likely to want come first
PAPER = "blocks, paper's recipe"
METHODS = {"blocks": (), "end to end": ("--baseline",)}
ALL_METHODS = METHODS | {PAPER: ("--recipe", "paper")}
OUT_OF_MEMORY = "out of memory"
OF_GLYPHS = ("positions", "pooling")  # settings that differ between glyphs and photographs


@dataclass(frozen=True)
class Options:
    """device: "cuda" or "cpu". preset: what the measuring stages use, "gpu" or "tiny". minutes: for all stages.
    seconds: for this one. out, scratch: folders for what is kept, and for what is not.
    """

    device: str
    preset: str
    minutes: float
    out: Path
    scratch: Path = Path()
    seconds: float = 0.0


def configure(name, preset, *flags):
    """(script, settings, flags) of train_<name>.py. If the preset's photographs are not on this machine, glyphs take
    their place, with settings of their own (OF_GLYPHS): nothing is downloaded here.
    """
    script = script_named(name)
    wanted, laptop = script.PRESETS[preset].get("data", ""), script.PRESETS["laptop"]
    flags = ["--preset", preset, *flags]
    if wanted in cifar.ARCHIVES and not cifar.is_here(wanted):
        flags += ["--data", "glyphs"]
        for setting in (s for s in OF_GLYPHS if hasattr(script.Settings, s)):
            value = laptop.get(setting, getattr(script.Settings, setting))
            flags += ["--" + setting.replace("_", "-"), str(value)]
    return *script_and_settings(name, flags), flags


def baseline_of(settings):
    """The settings of the end-to-end network. The looped one takes its mean number of recurrences each time."""
    whole = end_to_end(settings)
    return replace(whole, recurrences=round(1 + whole.mean_recurrence)) if hasattr(whole, "recurrences") else whole


def few_images(settings):
    """Settings that draw only as many images as a batch or two need, for when only bytes and seconds matter."""
    few = {"glyphs": 2 * settings.batch_size, "frechet_images": 0}
    return replace(settings, **{name: value for name, value in few.items() if hasattr(settings, name)})


def new_run(name, settings, shared):
    """The Run that a script makes. shared: what its prepare returned."""
    data, levels = shared
    depends_on = noise_identity(levels) if isinstance(levels, Partition) else {}
    if hasattr(settings, "sigma_data"):
        depends_on["sigma_data"] = script_named(name).noise_levels(settings, data)[1]
    return Run(name, settings, data.keeps(), data_sha256=data.sha256, **depends_on)


def train(run, script, shared, stop_after=None):
    """The training loop of a script. stop_after: the step after which to stop as SIGTERM does (KeyboardInterrupt)."""
    for _ in run.rounds():
        for b in run.blocks_to_train():
            block = first_weights(script.build, b, run.settings, *shared)
            optimizer = make_optimizer(block, run.settings)
            for step in run.steps(b, block, optimizer):
                run.record(*take_step(script, block, optimizer, run.settings, shared))
                if step == stop_after:
                    signal.raise_signal(signal.SIGTERM)
            del block, optimizer


def is_true_gpu(device):
    """Whether the CUDA runtime can be queried: PyTorch without CUDA has none, whatever device it pretends to have."""
    return device == "cuda" and torch.backends.cuda.is_built()


def warm_up(device):
    """Let a GPU allocate and load what it keeps: cuBLAS has a workspace for each thread, also for the backward pass."""
    layer = torch.nn.Linear(64, 64).to(device)
    for rounds in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=rounds):
            layer(torch.ones(64, 64, device=device)).float().sum().backward()


def computes_bfloat16(device):
    return device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def attempt(work, *args):
    """The dictionary that work(*args) returns; if it fails, one with the reason, so that the rest still runs."""
    try:
        return work(*args)
    except Exception as error:
        traceback.print_exc()  # into log.txt
        fault = OUT_OF_MEMORY if is_out_of_memory(error) else one_line(error)
    gc.collect()
    if is_true_gpu("cuda") and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a CUDA error, this raises it again
            torch.cuda.empty_cache()
    return {"passed": False, "said": fault}


def attempts(about, work, *args):
    """Yield a text that says what is attempted, then its record: `about`, with what attempt(work, *args) returns."""
    yield ", ".join(map(str, about.values()))
    yield about | attempt(work, *args)


def ensure(sound, otherwise):
    if not sound:
        raise RuntimeError(otherwise)


def one_line(error):
    """The error's name and first line."""
    text = next(filter(str.strip, str(error).splitlines()), "")
    return f"{type(error).__name__}: {textwrap.shorten(text, 200)}"
