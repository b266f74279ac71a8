"""Settings as a dataclass, and the command line made from it.

A script declares one dataclass; each field's help and limits stand beside its default. From it come the flags
(kebab-case), `--help`, the presets and recipes (named bundles of values), the checks and config.json. What wins: a
flag, then the recipe, then the preset, then the default. A flag that would do nothing is refused.
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from nano_db.errors import UsageError


def option(default, help, choices=None, least=None, below=None, above=None, free=False, only=None):
    """A dataclass field that becomes a flag.

    choices, least (>=), above (>) and below (<) limit the value. free: it may change between runs in one output
    folder, because the trained weights do not depend on it. only: "blocks" or "baseline", the one method that heeds
    the flag.
    """
    limits = {"choices": choices, "least": least, "below": below, "above": above}
    return field(default=default, metadata={"help": help, "limits": limits, "free": free, "only": only})


@dataclass
class RunSettings:
    """What every script has: the method, the training, the machine and the output."""

    no_flags: ClassVar[tuple[str, ...]] = ()  # fields that a script keeps as they are: its method has no use for them
    for_both: ClassVar[tuple[str, ...]] = ()  # fields marked `only` that this script's other method heeds, too

    preset: str = option("laptop", "scale of everything below", choices=("tiny", "laptop", "gpu", "paper"), free=True)
    blocks: int = option(4, "independently trained blocks", least=1, only="blocks")
    baseline: bool = option(False, "train the same network end to end with backpropagation instead")
    ensemble: int = option(1, "baselines trained independently and averaged (a control)", least=1, only="baseline")
    layers: int = option(8, "transformer layers in all", least=1)
    layer_split: str = option("", "layers of each block, noisiest first, like 3,6,3 (default: even)", only="blocks")
    overlap: float = option(
        0.1, "how far blocks train over their edges, the paper's gamma", least=0, below=1, only="blocks"
    )
    steps: int = option(1000, "training steps of each block (or of the baseline)", least=1)
    rounds: int = option(1, "turns the blocks take; the run is evaluated and sampled after each", least=1, free=True)
    batch_size: int = option(32, "samples a step", least=1)
    learning_rate: float = option(1e-3, "peak of AdamW's learning rate", above=0)
    warmup: int = option(50, "steps of linear warm-up, before the cosine", least=0)
    final_rate: float = option(0.1, "last learning rate, as a share of the peak", least=0)
    weight_decay: float = option(0.01, "AdamW's, on matrices only", least=0)
    clip: float = option(1.0, "largest norm of a block's gradient", above=0)
    ema: float = option(
        0.0, "decay of an exponential moving average of the weights, used to evaluate; 0: none", least=0, below=1
    )
    seed: int = option(0, "of everything random", least=0, below=2**31)
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"), free=True)
    dtype: str = option(
        "auto", "auto: bfloat16 autocast on CUDA, else float32", choices=("auto", "float32", "bfloat16")
    )
    compile: bool = option(False, "torch.compile the network", free=True)
    checkpoint_activations: bool = option(
        False, "keep a layer's input alone for the backward pass, and evaluate the layer again there", free=True
    )
    data_dir: str = option("data/cache", "where downloads are kept, or found", free=True)
    out: str = option("", "output folder (default: out/<script>-<method>)", free=True)
    only: str = option("", "train these blocks alone, like 2 or 0,3; evaluate when all are complete", free=True)
    eval_only: bool = option(False, "no training: evaluate and sample what the output folder holds", free=True)
    samples: int = option(1, "samples to draw", least=0, free=True)
    benchmark: int = option(
        0, "no training: time so many pairs of steps against the baseline", least=0, free=True, only="blocks"
    )
    log_every: int = option(50, "steps between two lines of metrics.jsonl", least=1, free=True)
    save_every: int = option(250, "steps between two saves of a block's file", least=1, free=True)

    @property
    def method(self):
        return "baseline" if self.baseline else "blocks"


@dataclass
class NoiseSettings:
    """What scripts have that denoise in sigma: p_noise, its partition, and the EDM constants."""

    recipe: str = option(
        "nano",
        "bundle of method options: the paper's, or what measures best",
        ("paper", "nano"),
        free=True,
        only="blocks",
    )
    partition: str = option(
        "probability", "edges of equal mass or uniform in ln sigma", ("probability", "uniform"), only="blocks"
    )
    noise: str = option(
        "lognormal",
        "p_noise: the paper's, or in proportion to the nats decided",
        ("lognormal", "information"),
        only="blocks",
    )
    p_mean: float = option(-1.2, "mean of ln sigma (lognormal)", only="blocks")
    p_std: float = option(1.2, "standard deviation of ln sigma (lognormal)", above=0, only="blocks")
    sigma_min: float = option(0.002, "least noise level", above=0, only="blocks")
    sigma_max: float = option(80.0, "greatest noise level", above=0, only="blocks")
    sigma_data: float = option(
        0.5, "EDM's scale of the clean target, for c_in and the paper's head", above=0, only="blocks"
    )
    loss_weight: str = option("none", "weight of the loss over sigma", choices=("none", "edm"), only="blocks")


@dataclass
class DiscreteSettings(NoiseSettings):
    """What scripts have besides whose blocks denoise one discrete answer (README: "Two recipes")."""

    head: str = option("posterior", "output head (codebook.py)", choices=("posterior", "paper"), only="blocks")
    range: str = option("own", "train on the own noise levels, or up to sigma_max", ("own", "upward"), only="blocks")
    z: str = option("inside", "is the network shown the noisy target?", choices=("inside", "outside"), only="blocks")
    walk: str = option("last", "who answers: the block at work, or all so far", ("last", "averaged"), only="blocks")
    grid: str = option("equal-mass", "noise levels of the walk", ("equal-mass", "karras"), free=True, only="blocks")


def check_discrete(s):
    """Raise UsageError for combinations of a DiscreteSettings that mean nothing."""
    if s.z == "outside" and s.head != "posterior":
        raise UsageError("--z outside needs --head posterior: else nothing would bring the noise in")
    if s.walk == "averaged" and s.z != "outside":
        raise UsageError(
            "--walk averaged needs --z outside: an average of words on p(y | x) needs words that know no z"
        )
    if s.range == "upward" and s.head != "posterior":
        raise UsageError("--range upward needs --head posterior: only there is one answer right at every noise level")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without argparse's usage block
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse(settings_class, presets, recipes, argv=None, description="", stored=None):
    """Read the command line into a checked `settings_class`. Exits with code 2 and one line where it cannot.

    presets, recipes: {name: {field: value}}; a script without recipes gives None. A preset may have a twin of the name
    "<preset>-baseline", with what differs there. stored: called with settings that hold --out, returns the settings
    saved there; with --eval-only these take the place of preset and recipe.
    """
    parser = Parser(
        usage="python %(prog)s [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    usual = {**presets[settings_class.preset], **(recipes[settings_class.recipe] if recipes else {})}
    for f in dataclasses.fields(settings_class):
        if f.name not in settings_class.no_flags:
            _add_flag(
                parser,
                f,
                usual.get(f.name, f.default),
                None if f.name in settings_class.for_both else f.metadata["only"],
            )
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        settings = _resolve(settings_class, presets, recipes, given, stored)
        check(settings, given)
    except UsageError as error:
        parser.error(str(error))
    return settings


def _add_flag(parser, f, usual, only):
    """The flag of a field; `usual` is its value when no flag is given at all; `only`: the one method that heeds it."""
    flag, choices = "--" + f.name.replace("_", "-"), f.metadata["limits"]["choices"]
    help = f.metadata["help"].replace("%", "%%") + (f" [{only} only]" if only else "")
    if isinstance(f.default, bool):
        parser.add_argument(flag, action="store_true", default=None, help=help)
        return
    kind = type(f.default)
    help += f" (default {usual})" if usual != "" else ""
    parser.add_argument(flag, type=kind, choices=choices, metavar=None if choices else kind.__name__.upper(), help=help)


def _resolve(settings_class, presets, recipes, given, stored):
    if given.get("eval_only") and stored:
        useless = [name for name in ("preset", "recipe", "benchmark") if name in given]
        if useless:
            raise UsageError(f"--{useless[0]} does nothing with --eval-only, which keeps the run's settings: drop it")
        return settings_class(**{**_sound(settings_class, stored(settings_class(**given))), **given})
    preset = given.get("preset", settings_class.preset)
    bundle = dict(presets[preset])
    if given.get("baseline"):
        bundle |= presets.get(f"{preset}-baseline", {})
    if recipes and not given.get("baseline"):
        bundle |= recipes[given.get("recipe", settings_class.recipe)]
    return settings_class(**{**bundle, **given})


def _sound(settings_class, values):
    """The values of a config.json that the settings know, if each has its field's type."""
    kept = {}
    for f in dataclasses.fields(settings_class):
        value = values.get(f.name, f.default)
        if not isinstance(value, type(f.default)) and not (isinstance(f.default, float) and isinstance(value, int)):
            raise UsageError(f"the config.json of that run is damaged: {f.name} is {value!r}")
        kept[f.name] = value
    return kept


def check(settings, given=()):
    """Raise UsageError for a value out of its limits, or for a flag among `given` that the method does not heed."""
    for f in dataclasses.fields(settings):
        value, flag, limits = getattr(settings, f.name), "--" + f.name.replace("_", "-"), f.metadata["limits"]
        least, above, below = limits["least"], limits["above"], limits["below"]
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{flag} must be a finite number, not {value}")
        if least is not None and value < least:
            raise UsageError(f"{flag} must be at least {least}, not {value}")
        if above is not None and value <= above:
            raise UsageError(f"{flag} must be greater than {above}, not {value}")
        if below is not None and value >= below:
            raise UsageError(f"{flag} must be less than {below}, not {value}")
        if limits["choices"] and value not in limits["choices"]:
            raise UsageError(f"{flag} must be one of {', '.join(map(str, limits['choices']))}, not {value}")
        if f.name in given and f.name not in settings.for_both and f.metadata["only"] not in (None, settings.method):
            raise UsageError(f"{flag} does nothing for the {settings.method} method: drop it")
    if getattr(settings, "sigma_min", 0) >= getattr(settings, "sigma_max", math.inf):
        raise UsageError(f"--sigma-min {settings.sigma_min} must be less than --sigma-max {settings.sigma_max}")
    if getattr(settings, "noise", "") == "information" and {"p_mean", "p_std"} & set(given):
        raise UsageError("--p-mean and --p-std do nothing for --noise information: drop them")


def frozen_fields(settings_class):
    """Names of the fields that a run's weights depend on: those must not change within one output folder."""
    return [f.name for f in dataclasses.fields(settings_class) if not f.metadata["free"]]


def command(main):
    """Run a script's main: a UsageError is one line on stderr and exit code 2, an interruption one line and 130."""
    try:
        main()
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was reached is saved, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
