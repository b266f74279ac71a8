"""The experiments behind the tables of results: their commands, and their rows in the tables.

A command is one that a reader can type: a script at its preset, a few flags, and a seed. In a table, blocks and the
networks compared with them take the same number of steps, and evaluate the same number of layers in them (the paper's
budget rule); rows that differ say so.
"""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit

SCRIPTS = {"vit": train_vit, "dit": train_dit, "mdm": train_mdm, "gpt": train_gpt, "looped": train_looped}
SCALES = {"laptop": {}, "tiny": dict(preset="tiny", steps=10, samples=0)}  # flags of all commands; tiny: for tests
# Flags that the command of the blocks shows although the preset already sets them.
BLOCKS = {"gpt": dict(blocks=4)}
# Best learning rate of the control, a network of a block's size (table `rates`).
SHALLOW_RATE = {"vit": 3e-3, "dit": 3e-3, "mdm": 3e-3, "gpt": 3e-3, "looped": 1e-3}
GROUPS = {  # the tables: their titles, and notes, which begin with the paper's counterpart
    "vit": ("Vision transformer", "The paper: CIFAR-100, 12 layers of width 128, patch 4, 3 blocks; accuracy in %."),
    "dit": ("Diffusion transformer", "The paper: CIFAR-10, DiT-S/2, 3 blocks; FID, which frechet_small is not."),
    "mdm": ("Masked diffusion", "The paper: text8, 12 layers of width 768, 3 blocks; bits per character."),
    "gpt": ("Autoregressive transformer", "The paper: LM1B and OpenWebText (OWT), 12 layers of width 768, 4 blocks; "
            "MAUVE of samples (higher is better), no likelihood."),
    "looped": ("Looped transformer", "The paper: LM1B, 2 + 4 + 2 layers of width 512; MAUVE of samples. Nothing is "
               "partitioned: B = 1, and the control of a block's size is a plain transformer of all layers."),
    "rates": ("Learning rates", "Seed 0; the best rate with three seeds. It is the best by the validation half of the "
              "held-out data with seed 0; all tables report the other half."),
    "vit-depth": ("How deep must a block be? Vision transformer", "12 layers in total. Blocks are compared with "
                  "plain networks that have as many layers as one block."),
    "gpt-depth": ("How deep must a block be? Autoregressive transformer", "The same comparison, with 8 layers."),
    "vit-recipes": ("Recipes of the vision transformer", "The effect of the clean term, and recipe paper."),
    "gpt-recipes": ("From recipe nano to recipe paper, one flag at a time", "A row differs from the first only "
                    "in what it names, and in what that excludes."),
    "dit-conversion": ("Blocks that start from a trained network", "Half as many steps as the network. Every run has "
                       "its own warm-up and cosine."),
    "dit-plateau": ("One run to the plateau: diffusion transformer", "The preset's steps, and five times as many (one "
                    "seed)."),
    "vit-cifar10": ("Vision transformer on photographs", "CIFAR-10, one seed."),
    "dit-cifar10": ("Diffusion transformer on photographs", "CIFAR-10, one seed."),
}  # fmt: skip
PAPERS = {  # the paper's numbers, end to end and in blocks
    "vit": ("60.25", "59.30"), "dit": ("39.83", "37.20"), "mdm": ("1.56", "1.45"),
    "gpt": ("LM1B 0.50, OWT 0.85", "LM1B 0.71, OWT 0.82"), "looped": ("0.49", "0.70"),
}  # fmt: skip
PHOTOGRAPHS = {"vit": dict(data="cifar10", pooling="mean", positions=0.3), "dit": dict(data="cifar10")}
LONGER = 5  # times the preset's steps, in the run to the plateau


def preset(script, scale, baseline=False):
    """The preset of a script at a scale: {setting: value}."""
    presets = SCRIPTS[script].PRESETS
    return {**presets[scale], **(presets.get(f"{scale}-baseline", {}) if baseline else {})}


def steps_of(script, scale, baseline=False):
    return SCALES[scale].get("steps", preset(script, scale, baseline)["steps"])


def rate_flag(script, scale, rate, baseline=True):
    """The flag of a learning rate, where it is not the preset's own."""
    own = preset(script, scale, baseline).get("learning_rate", SCRIPTS[script].Settings.learning_rate)
    return {} if rate == own else dict(learning_rate=rate)


def rates(script, method):
    """The three learning rates from which a method takes its best, a factor of three apart."""
    return (3e-4, 1e-3, 3e-3) if (script, method) == ("looped", "shallow") else (1e-3, 3e-3, 1e-2)


def cut(script, scale):
    """(blocks, layers in total) of a script's preset."""
    return BLOCKS.get(script, preset(script, scale)).get("blocks", 1), preset(script, scale).get("layers")


def shallow(script, scale, rate=None):
    """The flags of the control, a network of a block's size, at its best learning rate or at another."""
    if script == "looped":
        usual = preset(script, scale)
        sizes = dict(recurrences=1, sampling_steps=1, steps=steps_of(script, scale), warmup=usual["warmup"])
    else:
        blocks, layers = cut(script, scale)
        sizes = dict(layers=layers // blocks)
    return dict(baseline=True, **sizes, **rate_flag(script, scale, rate or SHALLOW_RATE[script]))


@dataclass(frozen=True)
class Experiment:
    """A row of a table: train_<script>.py with `flags`, and --seed 0, 1, ... seeds - 1. In a flag {seed} stands for the
    seed, and {out} for the folder of the scales' runs.
    """

    name: str  # its files are <name>-s<seed>.json
    group: str  # the table it stands in, a key of GROUPS
    row: str  # what the table calls it
    script: str
    flags: tuple[str, ...]
    seeds: int
    note: str = ""  # the paper's number

    def command(self, seed, out="out/results"):
        """What follows `python`, without --out."""
        flags = [flag.format(seed=seed, out=out) for flag in (*self.flags, "--seed", "{seed}")]
        return [f"train_{self.script}.py", *flags]

    def command_line(self, seed):
        return shlex.join(["python", *self.command(seed)])

    def file(self, seed):
        return f"{self.name}-s{seed}"

    def init_from(self, seed):
        """The file name of the run from whose network this one starts."""
        return Path(self.given("--init-from", "").format(seed=seed, out="")).name

    def given(self, flag, default=None):
        """The value of a flag, as text."""
        return self.flags[self.flags.index(flag) + 1] if flag in self.flags else default


class Tables:
    """The rows of a scale, in `found`. A row with the same flags as one of an earlier table shares its files."""

    def __init__(self, scale):
        self.scale, self.found, self.seeds = scale, [], 1 if scale == "tiny" else 3

    def add(self, table, slug, row, note="", seeds=None, script=None, **changes):
        """Without `seeds` a row has one seed, or as many as the earlier row with the same flags."""
        script, flags = script or table.split("-")[0], []
        for name, value in (SCALES[self.scale] | changes).items():
            flags += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        same = next((e for e in self.found if (e.script, e.flags) == (script, tuple(flags))), None)
        name, inherited = (same.name, same.seeds) if same else (f"{table}-{slug}", 1)
        self.found.append(Experiment(name, table, row, script, tuple(flags), seeds or inherited, note))


def experiments(scale):
    """All experiments of a scale, table by table."""
    tables = Tables(scale)
    for add in (add_architectures, add_rates, add_depth, add_recipes, add_conversion, add_plateau, add_photographs):
        add(tables)
    return tables.found


def add_architectures(tables):
    for script in SCRIPTS:
        (whole, cut_up), add = PAPERS[script], partial(tables.add, script)
        B, layers = cut(script, tables.scale)
        control = shallow(script, tables.scale)
        if script == "looped":
            names = "Huginn: about 33 recurrences", "one noisy pass", "a plain transformer of the same layers"
        else:
            names = "end to end", f"{B} blocks", f"one network of {layers // B} layers"
        add("baseline", names[0], whole, tables.seeds, baseline=True)
        add("blocks", names[1], "" if has_recipes(script) else cut_up, tables.seeds, **BLOCKS.get(script, {}))
        if has_recipes(script):
            add("paper", f"{names[1]}, recipe paper", cut_up, **BLOCKS.get(script, {}), recipe="paper")
        add("shallow", names[2], "", tables.seeds, **control)
        if B > 1:
            add("ensemble", f"mean of {B} such networks", "", tables.seeds, **control, ensemble=B)
    add_few(tables)


def add_few(tables):
    """The looped networks after as many steps as Huginn, which takes fewer in the same time."""
    add, steps = partial(tables.add, "looped", seeds=tables.seeds), steps_of("looped", tables.scale, baseline=True)
    if steps != steps_of("looped", tables.scale):
        few = dict(steps=steps, warmup=preset("looped", tables.scale, baseline=True)["warmup"])
        add("blocks-few", f"one noisy pass, {steps} steps", steps=steps)
        add("shallow-few", f"a plain transformer, {steps} steps", **shallow("looped", tables.scale) | few)


def has_recipes(script):
    return hasattr(SCRIPTS[script], "RECIPES")


def add_rates(tables):
    """Runs at a preset's own rates are those of the main table, and are run only once."""
    for script in SCRIPTS if tables.scale != "tiny" else ("gpt",):
        for method in ("blocks", "baseline", "shallow"):
            for rate in rates(script, method):
                if method == "shallow":
                    flags = shallow(script, tables.scale, rate)
                else:
                    flags = BLOCKS.get(script, {}) if method == "blocks" else dict(baseline=True)
                    flags = flags | rate_flag(script, tables.scale, rate, baseline=method == "baseline")
                slug, row = f"{script}-{method}-{rate:g}", f"{script}, {method}, {rate:g}"
                tables.add("rates", slug, row, script=script, **flags)


def of_layers(depth):
    return f"of {depth} layer{'s' * (depth > 1)}"


def add_depth(tables):
    """Blocks of the main table's depth, and of one other depth."""
    for script, other in (("vit", 2), ("gpt", 4)):
        B, layers = cut(script, tables.scale)
        rate = rate_flag(script, tables.scale, SHALLOW_RATE[script])
        for depth in sorted((layers // B, other)):
            add = partial(tables.add, f"{script}-depth", seeds=tables.seeds)
            add(f"plain-{depth}", f"plain network {of_layers(depth)}", baseline=True, layers=depth, **rate)
            cut_up = {} if layers // depth == B and script not in BLOCKS else dict(blocks=layers // depth)
            add(f"blocks-{depth}", f"{layers // depth} blocks {of_layers(depth)}", **cut_up)
        add(f"plain-{layers}", f"plain network {of_layers(layers)}", baseline=True)


def add_recipes(tables):
    add = partial(tables.add, "vit-recipes")
    add("nano", "recipe nano")
    add("clean", "without the clean term", seeds=tables.seeds, clean_weight=0.0)
    add("paper", "recipe paper", recipe="paper")
    add = partial(tables.add, "gpt-recipes", **BLOCKS["gpt"])
    add("nano", "recipe nano")
    add("clean", "without the clean term", seeds=tables.seeds, clean_weight=0.0)
    add("active", "only the active block predicts", predict="active")
    add("weight", "loss weighted by w(sigma)", loss_weight="edm")
    add("noise", "the paper's noise levels", noise="paper")
    add("head", "the paper's head, two streams", head="paper", predict="active")
    add("paper", "recipe paper", recipe="paper")


def add_conversion(tables):
    add = partial(tables.add, "dit-conversion", seeds=tables.seeds)
    half = dict(steps=steps_of("dit", tables.scale) // 2)
    start = dict(init_from=f"{{out}}/{tables.scale}/dit-baseline-s{{seed}}")
    add("network", "the network", baseline=True)
    add("further", "the network, trained further", baseline=True, **start, **half)
    add("nothing", "blocks from scratch", **half)
    add("started", "blocks that start from the network", **start, **half)


def add_plateau(tables):
    """The long runs, which are evaluated in rounds for the curves, beside those of the main table."""
    usual = steps_of("dit", tables.scale)
    for steps, changes in ((usual, {}), (LONGER * usual, dict(steps=LONGER * usual, rounds=10))):
        add_controls(tables, "dit-plateau", "dit", changes, f", {steps:,} steps")


def add_photographs(tables):
    for script in ("vit", "dit") if tables.scale != "tiny" else ():
        add_controls(tables, f"{script}-cifar10", script, PHOTOGRAPHS[script])


def add_controls(tables, table, script, changes, suffix=""):
    """End to end, blocks, one shallow network, the mean of B such networks, with `changes`; names end in `suffix`."""
    (B, layers), control = cut(script, tables.scale), shallow(script, tables.scale)
    add = partial(tables.add, table, **changes)
    add("baseline", "end to end" + suffix, baseline=True)
    add("blocks", f"{B} blocks{suffix}")
    add("shallow", f"one network of {layers // B} layers{suffix}", **control)
    add("ensemble", f"mean of {B} such networks{suffix}", **control, ensemble=B)
