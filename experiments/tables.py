"""The experiments behind the tables of results: the rows of each table, and the flags of each row.

The rows of a table have the same flags, except for what a row is named after. N steps of the baseline stand against N
steps of every block, in which as many layers are evaluated (the paper's budget rule). Rows of more steps say so.
"""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments import comparisons

CPU = dict(device="cpu")
# Flags of all runs of a scale (others: CPU); SCALES: those of each table. Baselines go without `blocks` and `overlap`.
FOR_ALL = {"tiny": CPU | dict(preset="tiny", steps=10, samples=0), "gpu": dict(preset="gpu", samples=0)}
SCALES = {  # a table "vit-..." has the flags of "vit", but for those in its own entry; None: without that flag
    "tiny": {  # for tests: a run takes seconds
        "vit": dict(layers=12, blocks=3, warmup=1, test_images=100), "dit": dict(layers=12, blocks=3),
        "mdm": dict(layers=12, blocks=3, warmup=1), "gpt": dict(layers=12, blocks=4), "looped": dict(warmup=1),
        "dit-ablations": dict(frechet_images=0),
    },
    "cpu": {  # the paper's proportions; narrow networks, large patches and few steps are what that costs
        "vit": dict(layers=12, blocks=3, patch=8, batch_size=128, steps=900, warmup=45, rounds=1, samples=0,
                    overlap=0.05),
        "dit": dict(layers=12, blocks=3, patch=8, batch_size=64, steps=600, warmup=30, ema=0.98, samples=0,
                    frechet_images=200, overlap=0.05),
        "mdm": dict(layers=12, blocks=3, width=96, seq_len=64, batch_size=32, steps=500, warmup=25, rounds=1, ema=0.98,
                    learning_rate=0.003, samples=0, eval_windows=256, overlap=0.05),
        "gpt": dict(layers=12, blocks=4, width=96, seq_len=64, batch_size=32, steps=400, warmup=20, rounds=1, samples=0,
                    eval_windows=256, overlap=0.1),
        "looped": dict(seq_len=64, batch_size=16, steps=150, warmup=8, rounds=1, samples=0, eval_windows=256),
        "dit-ablations": dict(frechet_images=0), "memory": dict(width=None),
    },
    "gpu": {
        "vit": dict(layers=12, blocks=3, steps=10_000, warmup=500), "dit": dict(layers=12, blocks=3),
        "mdm": dict(data="shakespeare", layers=12, blocks=3, steps=5000, warmup=250),
        "gpt": dict(data="shakespeare", layers=12, blocks=4, rounds=1),
        "looped": dict(data="shakespeare", steps=800, warmup=40),
        "dit-ablations": dict(steps=5000, warmup=250, ema=0.998, frechet_images=0),
    },
}  # fmt: skip
SCALES["real"] = {  # as cpu, but on photographs and on Shakespeare
    "vit": SCALES["cpu"]["vit"] | dict(data="cifar10", positions=0.3, pooling="mean", test_images=4000),
    "gpt": SCALES["cpu"]["gpt"] | dict(data="shakespeare"),
}
SCALES |= comparisons.SCALES
GROUPS = {  # the tables: their titles, and what to know about them; first what the paper has in their place
    "vit": ("Vision transformer", "The paper: CIFAR-100, 12 layers of width 128, patch 4, 3 blocks; accuracy in %."),
    "dit": ("Diffusion transformer", "The paper: CIFAR-10, DiT-S/2, 3 blocks; FID, which frechet_small is not."),
    "mdm": ("Masked diffusion", "The paper: text8, 12 layers of width 768, 3 blocks; bits per character."),
    "gpt": ("Autoregressive transformer", "The paper: LM1B and OpenWebText (OWT), 12 layers of width 768, 4 blocks; "
            "MAUVE of samples (higher is better), no likelihood."),
    "looped": ("Looped transformer", "The paper: LM1B, 2 + 4 + 2 layers of width 512; MAUVE of samples. Nothing is "
               "partitioned: B = 1, and the control of a block's size is a plain transformer of all layers."),
    "dit-ablations": ("Partition, overlap and number of blocks", "The paper: DiT-S/2, CIFAR-10, FID (tables 2, 7, A2). "
                      "A row differs from the first, which has 3 blocks and no overlap, in what it names."),
    "gpt-ablations": ("Head, loss weight and noise", "Ours. In all rows but the last only the active block predicts "
                      "(`--predict active`). A row differs from the first in what it names."),
    "vit-depth": ("How deep must a block be? Vision transformer", "Ours: 12 layers in all. A row of blocks stands "
                  "beside a plain network of as many layers as one of them has."),
    "dit-depth": ("How deep must a block be? Diffusion transformer", "The same comparison."),
    "gpt-depth": ("How deep must a block be? Autoregressive transformer", "The same comparison."),
    "dit-intervals": ("How deep must a block be? Diffusion transformer, by noise level", "Ours: 3 blocks of so many "
                      "layers each. A block's loss is that at its own noise levels; their sum is the EDM loss."),
    "mdm-steps": ("Masked diffusion: quality against steps", "Ours. In each run the learning rate falls to its end."),
    "checkpointing": ("Checkpointed activations", "20 training steps."),
    "memory": ("Memory against depth and number of blocks", "One training step of a GPT."),
    **comparisons.GROUPS,
}  # fmt: skip
for script in comparisons.CONVERSION:
    title = f"{GROUPS[script][0]}: blocks that start from a trained network"
    GROUPS[f"{script}-conversion"] = (title, "Every run has its own warm-up and cosine.")
MEMORY_LAYERS, MEMORY_BLOCKS = (4, 8, 12), (2, 4)
DEPTHS = (1, 2, 3, 4, 6, 12)  # layers of a block, of 12
THREE_SEEDS = (("cpu", "vit", 2), ("cpu", "dit", 1))  # rows of depth on which sentences of the README rest
RECIPE = dict.fromkeys(("vit", "gpt", "looped"), "nano")  # of blocks, where the script has recipes
MDM_TIMES = (0.5, 1, 2)  # the steps of the rows of mdm-steps, in those of the table mdm


@dataclass(frozen=True)
class Experiment:
    """A row of a table: train_<script>.py, or the module <script> of neighbours, with `flags`, and --seed 0, 1, ...
    seeds - 1. In a flag {seed} stands for the seed, and {out} for the folder of the scales' runs.
    """

    name: str  # its files are <name>-s<seed>.json
    group: str  # the table it stands in, a key of GROUPS
    row: str  # what the table calls it
    script: str
    flags: tuple[str, ...]
    seeds: int
    note: str = ""  # the last column: the paper's number; of neighbours, what passes between blocks

    def command(self, seed, out="out/results"):
        """What follows `python`, without --out."""
        flags = [flag.format(seed=seed, out=out) for flag in (*self.flags, "--seed", "{seed}")]
        if self.script in comparisons.MODULES:
            return ["-m", f"experiments.neighbours.{self.script}", *flags]
        return [f"train_{self.script}.py", *flags]

    def command_line(self, seed):
        return shlex.join(["python", *self.command(seed)])

    def file(self, seed):
        return f"{self.name}-s{seed}"

    def init_from(self, seed):
        """The file name of the run with whose network this one begins."""
        return Path(self.given("--init-from", "").format(seed=seed, out="")).name

    def given(self, flag, default=None):
        """The value of a flag, as text."""
        return self.flags[self.flags.index(flag) + 1] if flag in self.flags else default


class Tables:
    """The rows of a scale, `found`. A row with the flags of one of an earlier table has its name and files."""

    def __init__(self, scale):
        self.scale, self.found, self.seeds = scale, [], 2 if scale == "tiny" else 3

    def usual(self, script, table=None):
        """The flags of a script at this scale, and in a table."""
        return FOR_ALL.get(self.scale, CPU) | SCALES[self.scale][script] | SCALES[self.scale].get(table, {})

    def longer(self, script, times):
        return {name: round(times * self.usual(script)[name]) for name in ("steps", "warmup")}

    def add(self, table, slug, row, note="", seeds=None, script=None, **changes):
        """Without `seeds` a row has one, or as many as the earlier row with its flags."""
        script, flags = script or table.split("-")[0], []
        for name, value in (self.usual(script, table) | changes).items():
            if not (value is None or (changes.get("baseline") and name in ("blocks", "overlap"))):
                flags += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        same = next((e for e in self.found if (e.script, e.flags) == (script, tuple(flags))), None)
        name, inherited = (same.name, same.seeds) if same else (f"{table}-{slug}", 1)
        self.found.append(Experiment(name, table, row, script, tuple(flags), seeds or inherited, note))


def experiments(scale):
    """All experiments of a scale, table by table."""
    tables = Tables(scale)
    special = {"real": add_depth, "neighbours": comparisons.add_neighbours, "conversion": comparisons.add_conversion}
    usual = (add_architectures, add_ablations, add_depth, add_intervals, add_steps, add_memory)
    for add in (special[scale],) if scale in special else usual:
        add(tables)
    return tables.found


def add_architectures(tables):
    papers = {"vit": ("60.25", "59.30"), "dit": ("39.83", "37.20"), "mdm": ("1.56", "1.45")}
    papers["gpt"] = ("LM1B 0.50, OWT 0.85", "LM1B 0.71, OWT 0.82")
    for group, (whole, cut) in papers.items():
        add, B, deep = partial(tables.add, group), tables.usual(group)["blocks"], tables.usual(group)["layers"]
        shallow = dict(baseline=True, layers=deep // B)
        add("baseline", "end to end", whole, tables.seeds, baseline=True)
        if group in RECIPE:
            add("nano", f"{B} blocks, recipe nano", "", tables.seeds, recipe=RECIPE[group])
            add("paper", f"{B} blocks, recipe paper", cut, recipe="paper")
        else:
            add("blocks", f"{B} blocks", cut, tables.seeds)
        add("shallow", f"control: one network of {deep // B} layers", "", tables.seeds, **shallow)
        add("ensemble", f"control: mean of {B} such networks", "", tables.seeds, **shallow, ensemble=B)

    looped, seven = partial(tables.add, "looped", seeds=tables.seeds), tables.longer("looped", 7)
    looped("baseline", "Huginn: about 33 recurrences per step", "0.49", baseline=True)
    looped("nano", "one noisy pass, recipe nano", recipe="nano")
    looped("paper", "one noisy pass, recipe paper", "0.70", recipe="paper")
    row = "one noisy pass, recipe nano, 7 times the steps (about Huginn's seconds)"
    looped("nano-7-times", row, recipe="nano", **seven)
    row = "control: one recurrence, no noise (a plain transformer of the same layers)"
    plain = dict(baseline=True, recurrences=1, sampling_steps=1)
    looped("one-recurrence", row, **plain)
    looped("one-recurrence-7-times", f"{row}, 7 times the steps", **plain, **seven)


def add_ablations(tables):
    add, splits = partial(tables.add, "dit-ablations"), ("4,4,4", "3,6,3", "6,4,2", "2,4,6")
    for partition, label, fids in (
        ("probability", "equal probability", ("38.03", "41.64", "45.42", "40.40")),
        ("uniform", "uniform in ln sigma", ("43.53", "43.59", "47.49", "42.37")),
    ):
        for split, fid in zip(splits, fids, strict=True):
            slug = f"{partition}-{split.replace(',', '')}"
            add(slug, f"{label}, layers {split}", fid, partition=partition, layer_split=split, overlap=0.0)
    for overlap, fid in ((0.05, "37.20"), (0.1, "")):
        add(f"overlap-{overlap}", f"overlap {overlap:g}", fid, overlap=overlap)
    add("1-block", "1 block (end to end)", "39.83", baseline=True)
    for B, fid in ((2, "35.47"), (4, "45.43"), (6, "53.32")):
        add(f"{B}-blocks", f"{B} blocks", fid, blocks=B, overlap=0.0)

    add = partial(tables.add, "gpt-ablations", seeds=1, recipe="nano")
    add("first", "recipe nano, only the active block predicts", predict="active")
    add("weight", "loss weighted by w(sigma)", predict="active", loss_weight="edm")
    add("head", "the paper's head, two streams", predict="active", head="paper")
    add("averaged", "the mean of all blocks so far")


def of_layers(depth):
    return f"of {depth} layer{'s' * (depth > 1)}"


def add_depth(tables):
    for script in [script for script in ("vit", "dit", "gpt") if script in SCALES[tables.scale]]:
        deep, recipe = tables.usual(script)["layers"], RECIPE.get(script)
        for depth in DEPTHS:
            seeds = tables.seeds if (tables.scale, script, depth) in THREE_SEEDS else None
            add, B = partial(tables.add, f"{script}-depth", seeds=seeds), deep // depth
            add(f"plain-{depth}", f"plain network {of_layers(depth)}", baseline=True, layers=depth)
            if B > 1:
                add(f"blocks-{depth}", f"{B} blocks {of_layers(depth)}", blocks=B, recipe=recipe)


def add_intervals(tables):
    B = tables.usual("dit")["blocks"]
    for depth in DEPTHS:
        tables.add("dit-intervals", str(depth), f"{B} blocks {of_layers(depth)}", seeds=1, layers=B * depth)


def add_steps(tables):
    B, deep = tables.usual("mdm")["blocks"], tables.usual("mdm")["layers"]
    shallow = dict(baseline=True, layers=deep // B)
    for times in MDM_TIMES:
        changes = tables.longer("mdm", times)
        add, many = partial(tables.add, "mdm-steps", seeds=1, **changes), changes["steps"]
        add(f"baseline-{many}", "end to end", baseline=True)
        add(f"blocks-{many}", f"{B} blocks")
        add(f"shallow-{many}", f"control: one network of {deep // B} layers", **shallow)
        add(f"ensemble-{many}", f"control: mean of {B} such networks", **shallow, ensemble=B)


def add_memory(tables):
    both = (("", "", {}), ("-checkpointed", ", checkpointed", dict(checkpoint_activations=True)))
    for script in ("vit", "dit", "mdm", "gpt", "looped"):
        few = {"vit": dict(test_images=256), "dit": dict(frechet_images=0)}.get(script, dict(eval_windows=8))
        add = partial(tables.add, "checkpointing", script=script, steps=20, warmup=0, **few)
        deep, cut = ("Huginn", "one noisy pass") if script == "looped" else ("end to end", "blocks")
        for slug, tail, saving in both:
            add(f"{script}-baseline{slug}", f"{GROUPS[script][0]}, {deep}{tail}", baseline=True, **saving)
            add(f"{script}-blocks{slug}", f"{GROUPS[script][0]}, {cut}{tail}", recipe=RECIPE.get(script), **saving)

    add = partial(tables.add, "memory", script="gpt", steps=1, warmup=0, eval_windows=1)
    for layers in MEMORY_LAYERS:
        for slug, tail, saving in both:
            add(f"{layers}-layers{slug}", f"{layers} layers, end to end{tail}", baseline=True, layers=layers, **saving)
            for B in MEMORY_BLOCKS:
                row = f"{layers} layers, {B} blocks{tail}"
                add(f"{layers}-layers-{B}-blocks{slug}", row, blocks=B, layers=layers, **saving)
