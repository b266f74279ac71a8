"""Settings as a dataclass, and the command line made from it.

A script declares one dataclass; each field's help and limits stand beside its default. From it come the flags
(kebab-case), `--help`, the presets and recipes (named bundles of values), the checks and config.json. Precedence: a
flag, then the recipe, then the preset, then the default. A flag without effect is refused.
"""

import argparse
import dataclasses
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import read_config
from nano_db.trainer.distributed import is_first, is_one_of_several

PRESETS = ("auto", "tiny", "laptop", "gpu", "paper")
TRIAL = 0.1  # of a preset's steps: a run of fewer is a trial, and is evaluated on fewer samples
EVALUATED, FEWEST = ("eval_windows", "test_images", "frechet_images"), 100  # sample counts, and their minimum
RENAMED = {  # flags of earlier versions: what to use instead
    "--walk": "--predict (active for last)", "--calls": "--sampling-steps", "--unmask-steps": "--sampling-steps",
    "--turns": "--recurrences", "--backprop-turns": "--backprop-depth", "--start-from": "--init-from",
    "--readout": "--pooling", "--micro-batch": "--checkpoint-activations",
}  # fmt: skip


def option(
    group, default, help, choices=None, at_least=None, below=None, above=None,
    of=None, flag=True, resumable=False, trains=False, once=False, needs="", idle=lambda settings: "", kind=None,
):  # fmt: skip
    """A dataclass field, and the flag made from it, under the heading `group` of --help.

    choices, at_least, above and below limit the value. of: "blocks" or "baseline", the one method that uses it.
    flag=False: only presets and recipes set it. resumable: it may change between runs in the same output folder,
    because the trained weights do not depend on it. trains: resumable, but only training uses it, so --eval-only
    refuses it. once: it applies to one command, and --eval-only does not inherit it. needs: names of settings; unless
    one of them is set, this one does nothing. idle: a function of all settings that names another flag which leaves
    this one without effect. kind: the type, if the default is None: a value that the script determines itself.
    """
    about = {"group": group, "help": help, "choices": choices, "at_least": at_least, "below": below, "above": above}
    about["kind"] = kind or type(default)
    about |= {"of": of, "flag": flag, "resumable": resumable or trains or group == "output"}
    return field(default=default, metadata=about | {"trains": trains, "once": once, "needs": needs, "idle": idle})


def one_round(settings):
    """What limits a run to a single round, if more were requested."""
    lone = "--only" if getattr(settings, "only", "") else is_one_of_several() and "torchrun"
    return settings.rounds > 1 and lone


method, network, training, output = (partial(option, group) for group in ("method", "network", "training", "output"))


@dataclass
class Training:
    """The settings of every script."""

    preset: str = training("auto", "scale; auto: gpu on CUDA, else laptop", choices=PRESETS, trains=True)
    baseline: bool = method(False, "train the same network end to end with backpropagation instead")
    steps: int = training(1000, "steps of each block (or of the baseline)", at_least=1)
    rounds: int = training(
        1, "the blocks take turns in rounds, each followed by an evaluation", at_least=1, trains=True, idle=one_round
    )
    batch_size: int = training(32, "samples per step", at_least=1)
    learning_rate: float = training(1e-3, "peak of AdamW's learning rate", above=0)
    warmup: int = training(50, "steps of linear warm-up, before the cosine", at_least=0)
    final_rate: float = training(0.1, "last learning rate, as a share of the peak", flag=False)
    weight_decay: float = training(0.01, "AdamW's, on matrices only", at_least=0, flag=False)
    clip: float = training(1.0, "maximum norm of a block's gradient", above=0, flag=False)
    ema: float = training(0.0, "decay of the weights' moving average used to evaluate; 0: none", at_least=0, below=1)
    seed: int = training(0, "random seed", at_least=0, below=2**31)
    device: str = training(
        "auto", "where to train; auto: cuda, else cpu (mps, a Mac's GPU, only on request: it is untested)",
        choices=("auto", "cpu", "cuda", "mps"), resumable=True,
    )  # fmt: skip
    dtype: str = training(
        "auto", "auto: the run's own; if new, bfloat16 on CUDA, else float32", choices=("auto", "float32", "bfloat16")
    )
    compile: bool = training(False, "torch.compile the network (needs a C++ compiler; on CUDA, Triton)", trains=True)
    checkpoint_activations: bool = training(
        False, "keep only each layer's input, and recompute the layer in the backward pass", trains=True
    )
    init_from: str = training("", "start from the weights of a finished run: its folder (docs/running.md)")
    out: str = output("", "folder of the run (default: out/<script>-<method>)")
    eval_only: bool = output(False, "do not train: evaluate and sample the run in --out")
    samples: int = output(1, "samples to draw", at_least=0)

    @property
    def method(self):
        return "baseline" if self.baseline else "blocks"

    def of_baseline(self):
        """{setting: value} of the end-to-end network with which a run of blocks is compared."""
        return {"baseline": True}


@dataclass
class Blocks:
    """More settings, for scripts whose network is cut into blocks."""

    blocks: int = method(4, "independently trained blocks", at_least=1, of="blocks")
    overlap: float = method(0.1, "how far blocks train beyond their edges (gamma)", at_least=0, below=1, of="blocks")
    ensemble: int = method(1, "baselines trained independently and averaged (a control)", at_least=1, of="baseline")
    layers: int = network(8, "transformer layers in all", at_least=1)
    only: str = training(
        "", "train only these blocks, like 2 or 0,3; evaluate once all are trained", trains=True, once=True
    )

    def of_baseline(self):
        return super().of_baseline() | {"ensemble": 1}


@dataclass
class Discrete:
    """More settings, for scripts whose blocks denoise a label or a token."""

    recipe: str = method("nano", "bundle of options: ours, or the paper's", ("nano", "paper"), of="blocks", trains=True)
    noise: str = method("nano", "noise levels", ("nano", "paper"), of="blocks")
    loss_weight: str = method("none", "weighting of the loss over sigma", choices=("none", "edm"), of="blocks")
    ema: float = training(0.0, "as in Training; no preset of these scripts uses it", flag=False)

    def other_head(self):
        """The flag that makes the network see z, and not only the head."""
        return self.head != "denoising" and f"--head {self.head}"


class Parser(argparse.ArgumentParser):
    """Keeps the line breaks of its description, and reports an error in one line."""

    def __init__(self, **how):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **how})

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def read_settings(script, settings_class, presets, recipes=None, description=None, flags=None):
    """The command line as checked settings, with `device` and `dtype` resolved. Raises UsageError if they are invalid.

    presets, recipes: {name: {field: value}}. A preset may have a twin named "<preset>-baseline", with what
    differs for the baseline. With --eval-only the settings saved in the run's folder replace preset and recipe.
    flags: a list to read instead of the command line.
    """
    usual = {**presets["laptop"], **(recipes["nano"] if recipes else {})}
    given = parse(script, settings_class, usual, description, flags)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if given.setdefault("device", "auto") == "auto":
        given["device"] = "cuda" if available["cuda"] else "cpu"
    if not available.get(given["device"], True):
        raise UsageError(f"--device {given['device']} is not available on this machine; use --device cpu (or auto)")
    given.setdefault("out", f"out/{script}-{'baseline' if given.get('baseline') else 'blocks'}")
    if given.get("dtype") == "auto":
        del given["dtype"]
    begun = os.path.exists(Path(given["out"]) / "config.json")
    stored = stored_settings(script, settings_class, given["out"]) if begun or given.get("eval_only") else {}
    if given.get("eval_only"):
        bundle = stored
    else:
        preset = given.pop("preset", "auto")
        if preset == "auto":
            preset = "gpu" if given["device"] == "cuda" else "laptop"
        bundle = {**presets[preset], "preset": preset, "dtype": stored.get("dtype", "auto")}
        if given.get("baseline"):
            bundle |= presets.get(f"{preset}-baseline", {})
        elif recipes:
            bundle |= recipes[given.get("recipe", settings_class.recipe)]
        whole = settings_class(**bundle)
        bundle |= shortened(whole, given.get("steps", whole.steps))
    settings = settings_class(**{**bundle, **given})
    validate(settings, given)
    if not settings.eval_only and is_first():
        say_what_is_shorter(whole, settings, given)
    if settings.dtype == "auto":  # for a new run; one begun on a CPU continues in float32 on a GPU
        computes = settings.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        settings.dtype = "bfloat16" if computes else "float32"
    return settings


def parse(script, settings_class, usual, description, flags):
    """{field: value} of the flags that were given. usual: values that --help shows instead of the defaults."""
    how = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    prog, usage = f"train_{script}.py", "python %(prog)s [flags]"
    parser = Parser(prog=prog, usage=usage, description=description, **how)
    groups = {name: parser.add_argument_group(name) for name in ("method", "network", "training", "output")}
    for f in dataclasses.fields(settings_class):
        about, kind, value = f.metadata, f.metadata["kind"], usual.get(f.name, f.default)
        if about["flag"]:
            text = about["help"].replace("%", "%%") + (f" [{about['of']} only]" if about["of"] else "")
            form = {"action": "store_true"}
            if kind is not bool:
                text += f" (default {value})" if value not in ("", None) else ""
                form = {"type": kind, "choices": about["choices"]}
                form["metavar"] = None if about["choices"] else kind.__name__
            groups[about["group"]].add_argument(flag_of(f), help=text, **form)
    given, unknown = parser.parse_known_args(flags)
    for flag in (argument.split("=")[0] for argument in unknown):
        if flag in RENAMED and RENAMED[flag].split()[0][2:].replace("-", "_") in settings_class.__dataclass_fields__:
            raise UsageError(f"{flag} is gone: use {RENAMED[flag]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return vars(given)


def shortened(whole, steps):
    """{name: value} of the settings that change in a run of fewer `steps` than a preset, `whole`: warm-up and rounds
    shrink in proportion, and a trial is evaluated on a tenth of the samples. (The moving average adapts by itself:
    run.ema_decay.)
    """
    share, values = steps / whole.steps, {}
    if share < 1:
        values = {"warmup": round(share * whole.warmup), "rounds": max(1, round(share * whole.rounds))}
    if share < TRIAL:
        sizes = {name: getattr(whole, name, 0) for name in EVALUATED}  # 0: all, or none
        values |= {name: min(size, max(FEWEST, size // 10)) for name, size in sizes.items()}
    return {name: value for name, value in values.items() if value != getattr(whole, name, 0)}


def say_what_is_shorter(whole, settings, given):
    """Print which values of the preset, `whole`, change because the run has fewer steps."""
    names = [name for name in shortened(whole, settings.steps) if name not in given]
    if names:
        told = ", ".join(f"{name} {getattr(settings, name)} (of {getattr(whole, name)})" for name in names)
        print(f"--steps {settings.steps} in place of the preset's {whole.steps}, so {told}")


def flag_of(field):
    return "--" + field.name.replace("_", "-")


def stored_settings(script, settings_class, folder):
    """The settings in a run's config.json that the class knows, except one-off ones; UsageError for a wrong type."""
    config, kept = read_config(folder), {}
    if config["script"] != script:
        raise UsageError(f"{folder} holds a run of train_{config['script']}.py: choose another --out")
    for f in dataclasses.fields(settings_class):
        value, kind = config["settings"].get(f.name, f.default), f.metadata["kind"]
        if value is not f.default and not isinstance(value, (float, int) if kind is float else kind):
            fault = f"{folder}/config.json is damaged ({f.name} is {value!r})"
            raise UsageError(f"{fault}: move the folder away, or choose another --out")
        if not f.metadata["once"]:
            kept[f.name] = value
    return kept


def validate(settings, given):
    """Raise UsageError for a value outside its limits, or for a flag in `given` without effect."""
    for f in dataclasses.fields(settings):
        value, flag, about = getattr(settings, f.name), flag_of(f), f.metadata
        low, below, above = about["at_least"], about["below"], about["above"]
        if value is None:  # the script determines it
            continue
        if f.name in given and value == "" and not about["needs"]:  # --prompt and the like may be empty
            raise UsageError(f"{flag} is empty: give it a value, or drop it")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{flag} must be a finite number, not {value}")
        if low is not None and value < low:
            raise UsageError(f"{flag} must be at least {low}, not {value}")
        if above is not None and value <= above:
            raise UsageError(f"{flag} must be greater than {above}, not {value}")
        if below is not None and value >= below:
            limit = f"at most {below - 1}" if isinstance(value, int) else f"less than {below}"
            raise UsageError(f"{flag} must be {limit}, not {value}")
        if isinstance(value, int) and value >= 2**31:
            raise UsageError(f"{flag} must be less than 2^31, not {value}")
        if about["choices"] and value not in about["choices"]:
            raise UsageError(f"{flag} must be one of {', '.join(map(str, about['choices']))}, not {value}")
        needed, other = about["needs"].split(), about["idle"](settings)
        other = other and f"with {other}"
        if settings.eval_only and about["trains"]:
            other = "with --eval-only, which trains nothing"
        elif about["of"] and (about["of"] == "baseline") != settings.baseline:
            other = f"with the {settings.method} method"
        elif needed and not any(getattr(settings, name) for name in needed):
            number = getattr(settings, needed[0]) == 0
            other = f"with --{needed[0]} 0" if number else f"without --{needed[0]}"
        if f.name in given and other:
            raise UsageError(f"{flag} does nothing {other}: drop it")
    if settings.warmup > settings.steps and not settings.eval_only:
        never = f"is longer than --steps {settings.steps}: the learning rate would never reach its peak"
        raise UsageError(f"--warmup {settings.warmup} {never}")
    if "rounds" in given and settings.rounds > settings.steps:
        raise UsageError(f"--rounds {settings.rounds} is more than --steps {settings.steps}: a round needs a step")
