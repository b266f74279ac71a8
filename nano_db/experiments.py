"""What the tables of results are made of: the experiments of each scale, with the flags that each row is about.

Within a table all rows have the same flags, but for those that the row is about: N steps of the baseline stand against
N steps of every block, which evaluate as many layers (the paper's budget rule). Rows of more steps say so.
"""

import shlex
from dataclasses import dataclass
from functools import partial

# Flags of all rows of a table, by scale. Of the blocks method alone: SHARED_BY_BLOCKS, below.
SCALES = {
    "tiny": {  # for tests: seconds a run
        "vit": dict(preset="tiny", device="cpu", layers=12, blocks=3, steps=10, warmup=1, samples=0, test_images=100),
        "dit": dict(preset="tiny", device="cpu", layers=12, blocks=3, steps=10, samples=0),
        "mdm": dict(preset="tiny", device="cpu", layers=12, blocks=3, steps=10, samples=0),
        "gpt": dict(preset="tiny", device="cpu", layers=12, blocks=4, steps=10, samples=0),
        "looped": dict(preset="tiny", device="cpu", steps=10, warmup=1, samples=0),
        "dit-ablations": dict(
            preset="tiny", device="cpu", layers=12, blocks=3, steps=10, samples=0, frechet_images=0,
        ),
    },
    "cpu": {  # about two minutes a run on one core
        "vit": dict(
            device="cpu", layers=6, blocks=3, patch=8, batch_size=128, steps=900, warmup=45, rounds=1, samples=0,
        ),
        "dit": dict(
            device="cpu", layers=6, blocks=3, batch_size=64, steps=400, warmup=20, ema=0.98, samples=0,
            frechet_images=200,
        ),
        "mdm": dict(
            device="cpu", layers=6, blocks=3, seq_len=64, batch_size=32, steps=500, warmup=25, rounds=1, ema=0.98,
            learning_rate=0.003, samples=0, eval_windows=256,
        ),
        "gpt": dict(
            device="cpu", layers=8, blocks=4, seq_len=64, batch_size=32, steps=400, warmup=20, rounds=1, samples=0,
            eval_windows=256,
        ),
        "looped": dict(
            device="cpu", seq_len=64, batch_size=16, steps=150, warmup=8, rounds=1, samples=0, eval_windows=256,
        ),
        "dit-ablations": dict(  # 12 layers, so that the paper's splits and counts fit; larger patches pay for them
            device="cpu", layers=12, blocks=3, patch=8, batch_size=64, steps=600, warmup=30, ema=0.98, samples=0,
            frechet_images=0,
        ),
    },
    "gpu": {
        "vit": dict(preset="gpu", layers=12, blocks=3, steps=10_000, warmup=500, samples=0),
        "dit": dict(preset="gpu", layers=12, blocks=3, samples=0),
        "mdm": dict(preset="gpu", data="shakespeare", layers=12, blocks=3, samples=0),
        "gpt": dict(preset="gpu", data="shakespeare", layers=12, blocks=4, rounds=1, samples=0),
        "looped": dict(preset="gpu", data="shakespeare", steps=800, warmup=40, samples=0),
        "dit-ablations": dict(
            preset="gpu", layers=12, blocks=3, steps=5000, warmup=250, ema=0.998, samples=0, frechet_images=0,
        ),
    },
}  # fmt: skip
SHARED_BY_BLOCKS = {
    "vit": {"overlap": 0.05},
    "dit": {"overlap": 0.05},
    "mdm": {"overlap": 0.05},
    "gpt": {"overlap": 0.1},
}

# Seconds of a training step of all blocks (or of the baseline), and of all else that a run does, on one core of a
# server CPU: steps measured for `cpu`, the rest guessed. Where a scale is not named, nobody has measured it.
SECONDS = {
    "tiny": dict.fromkeys(("vit", "dit", "mdm", "gpt", "looped", "dit-ablations"), (0.03, 5)),
    "cpu": {
        "vit": (0.13, 15),
        "dit": (0.29, 40),
        "mdm": (0.22, 35),
        "gpt": (0.33, 30),
        "looped": (0.13, 60),
        "dit-ablations": (0.17, 15),
    },
}

GROUPS = {  # the tables: their titles, and what the paper's counterpart is
    "vit": (
        "Vision transformer",
        "The paper: CIFAR-100, 12 layers of width 128, patch 4, 3 blocks, 500 epochs of batches of 128; accuracy in %.",
    ),
    "dit": (
        "Diffusion transformer",
        "The paper: CIFAR-10, DiT-S/2 (12 layers of width 384, patch 2), 3 blocks, 100 epochs of batches of 512; FID "
        "of test images, which frechet_small is not.",
    ),
    "mdm": (
        "Masked diffusion",
        "The paper: text8, 12 layers of width 768, windows of 256, 3 blocks, batches of 256; bits per character.",
    ),
    "gpt": (
        "Autoregressive transformer",
        "The paper: LM1B (windows of 256) and OpenWebText (3,072), 12 layers of width 768, 4 blocks, batches of 256; "
        "MAUVE of samples (higher is better), no likelihood.",
    ),
    "looped": (
        "Looped transformer",
        "The paper: LM1B, prelude 2, core 4, coda 2 layers of width 512; MAUVE of samples (higher is better), with a "
        "tenth of the compute for one noisy pass. Nothing is partitioned: B = 1, and the control of a block's size is "
        "a plain transformer of all layers.",
    ),
    "dit-ablations": (
        "Partition, overlap and number of blocks",
        "The paper: DiT-S/2 on CIFAR-10, 12 layers, FID of test images (its tables 2, 7 and A2). A row differs from "
        "the first, which has 3 blocks and no overlap, in what it names.",
    ),
    "vit-levers": (
        "Vision transformer: what would help the blocks",
        "Ours. A row differs from recipe nano of the first table, or from its end-to-end network, in what it names.",
    ),
    "gpt-ablations": (
        "Head, loss weight, noise and streams",
        "Ours: the paper has no such rows. Blocks see z, train on their own noise levels and answer alone (`--z inside "
        "--range own --walk last`), else these choices would change nothing; a row differs from the first in what it "
        "names.",
    ),
    "memory": (
        "Memory against depth and number of blocks",
        "One step of train_gpt.py. The formulas are the paper's (appendix G): with P parameters and A activations a "
        "layer, training takes (4P + A) L end to end and (4P + A) L / B in blocks (weights, gradients and two averages "
        "of AdamW make four); with checkpointed activations 4P L + A, to which we add I (L - 1), the inputs of the "
        "other layers. P, A and what does not depend on depth are read off the end-to-end networks of least and most "
        "layers; I is computed.",
    ),
}  # fmt: skip
MEMORY_LAYERS, MEMORY_BLOCKS = (4, 8, 12), (2, 4)
HUGINN = 900 / 130  # seconds of a step of the looped baseline, to one noisy pass
CHECKPOINTED = 4 / 3  # a forward pass more


@dataclass(frozen=True)
class Experiment:
    """A row of a table: train_<script>.py with `flags`, and --seed 0, 1, ... seeds - 1."""

    name: str  # its files are <name>-s<seed>.json
    group: str  # the table it stands in, a key of GROUPS
    row: str  # what the table calls it
    script: str
    flags: tuple[str, ...]
    seeds: int
    seconds: float  # that a seed takes, as estimated; 0: unknown
    paper: str = ""  # the paper's number

    def command(self, seed):
        """What follows `python`, without --out."""
        return [f"train_{self.script}.py", *self.flags, "--seed", str(seed)]

    def command_line(self, seed):
        return shlex.join(["python", *self.command(seed)])

    def file(self, seed):
        return f"{self.name}-s{seed}"

    def given(self, flag, default=None):
        """The value of a flag, as text."""
        return self.flags[self.flags.index(flag) + 1] if flag in self.flags else default


def experiments(scale):
    """All experiments of a scale, tables in the order of GROUPS."""
    seeds = 2 if scale == "tiny" else 3
    found = []

    def add(group, slug, row, cost=1.0, seeds=1, paper="", base=None, **changes):
        """cost: of a step, in steps of all blocks. base: the table in SCALES whose flags these are, if not `group`."""
        base = base or group
        script = base.split("-")[0]
        values = dict(SCALES[scale][base])
        if script in SHARED_BY_BLOCKS:
            values |= SHARED_BY_BLOCKS[script]
        values |= changes
        if values.get("baseline"):
            values = {name: value for name, value in values.items() if name not in ("blocks", "overlap")}
        step, rest = SECONDS.get(scale, {}).get(base, (0, 0))
        seconds = step * cost * values.get("steps", 0) + rest
        found.append(Experiment(f"{group}-{slug}", group, row, script, _flags(values), seeds, seconds, paper))

    paper = {
        "vit": ("60.25", "59.30"),
        "dit": ("39.83", "37.20"),
        "mdm": ("1.56", "1.45"),
        "gpt": ("0.50; OWT 0.85", "0.71; OWT 0.82"),
    }
    for group in ("vit", "dit", "mdm", "gpt"):
        base = SCALES[scale][group]
        B, shallow = base["blocks"], base["layers"] // base["blocks"]
        end_to_end, blocks = paper[group]
        add(group, "baseline", "end to end", seeds=seeds, paper=end_to_end, baseline=True)
        if group in ("vit", "gpt"):
            add(group, "nano", f"{B} blocks, recipe nano", seeds=seeds, recipe="nano")
            cost = 2 if group == "gpt" else 1  # two streams
            add(group, "paper", f"{B} blocks, recipe paper", cost, seeds, blocks, recipe="paper")
        else:
            add(group, "blocks", f"{B} blocks", seeds=seeds, paper=blocks)
        row = f"control: one network of {shallow} layers"
        add(group, "shallow", row, 1 / B, seeds, baseline=True, layers=shallow)
        row = f"control: mean of {B} such networks"
        add(group, "ensemble", row, 1, seeds, baseline=True, layers=shallow, ensemble=B)
        row = "end to end, activations checkpointed"
        add(group, "baseline-checkpointed", row, CHECKPOINTED, baseline=True, checkpoint_activations=True)
        row = f"{B} blocks, activations checkpointed"
        add(group, "blocks-checkpointed", row, CHECKPOINTED, checkpoint_activations=True)

    def longer(group, times):
        return {name: times * SCALES[scale][group][name] for name in ("steps", "warmup")}

    add("looped", "baseline", "Huginn: about 33 turns a step", HUGINN, seeds, "0.49", baseline=True)
    add("looped", "nano", "one noisy pass, recipe nano", 1, seeds, recipe="nano")
    add("looped", "paper", "one noisy pass, recipe paper", 1, seeds, "0.70", recipe="paper")
    row = "one noisy pass, recipe nano, 7 times the steps (about Huginn's seconds)"
    add("looped", "nano-7-times", row, 1, seeds, recipe="nano", **longer("looped", 7))
    row = "control: one turn, no noise (a plain transformer of the same layers)"
    plain = dict(baseline=True, mean_recurrence=0.000001, calls=1)
    add("looped", "one-turn", row, 1, seeds, **plain)
    add("looped", "one-turn-7-times", f"{row}, 7 times the steps", 1, seeds, **plain, **longer("looped", 7))
    row = "Huginn, activations checkpointed"
    add("looped", "baseline-checkpointed", row, HUGINN * CHECKPOINTED, baseline=True, checkpoint_activations=True)

    group = "dit-ablations"
    splits = ("4,4,4", "3,6,3", "6,4,2", "2,4,6")
    fid = {"probability": ("38.03", "41.64", "45.42", "40.40"), "uniform": ("43.53", "43.59", "47.49", "42.37")}
    for partition, label in (("probability", "equal probability"), ("uniform", "uniform in ln sigma")):
        for split, paper in zip(splits, fid[partition], strict=True):
            slug, row = f"{partition}-{split.replace(',', '')}", f"{label}, layers {split}"
            add(group, slug, row, paper=paper, partition=partition, layer_split=split, overlap=0.0)
    for overlap, paper in ((0.05, "37.20"), (0.1, "")):
        add(group, f"overlap-{overlap}", f"overlap {overlap:g}", paper=paper, overlap=overlap)
    add(group, "1-block", "1 block (end to end)", paper="39.83", baseline=True)
    for B, paper in ((2, "35.47"), (4, "45.43"), (6, "53.32")):
        add(group, f"{B}-blocks", f"{B} blocks", paper=paper, blocks=B, overlap=0.0)

    lever = partial(add, "vit-levers", base="vit")
    lever("noise", "blocks, more noise: ln sigma ~ N(1.3, 0.8²)", seeds=seeds, recipe="nano", p_mean=1.3)
    lever("2-blocks", "2 blocks of half the layers", recipe="nano", blocks=2)
    readout = "token" if scale == "gpu" else "mean"  # which the preset does not take
    for method, changes in (("blocks", dict(recipe="nano")), ("end to end", dict(baseline=True))):
        slug = method.replace(" ", "-")
        where = "the label token alone" if readout == "token" else "the mean of all tokens"
        lever(f"readout-{slug}", f"{method}, read off {where}", readout=readout, **changes)
        lever(f"twice-{slug}", f"{method}, twice the steps", **longer("vit", 2), **changes)

    def ablation(slug, row, cost=1.0, **changes):
        fixed = dict(recipe="nano", z="inside", range="own", walk="last")
        add("gpt-ablations", slug, row, cost, base="gpt", **fixed, **changes)

    ablation("first", "posterior head, unweighted loss, lognormal noise, one stream")
    ablation("head", "the paper's head", head="paper")
    ablation("weight", "loss weighted by w(sigma)", loss_weight="edm")
    ablation("noise", "information noise", noise="information")
    ablation("streams", "two streams", 2, streams=2)

    once = dict(base="gpt", steps=1, warmup=0, eval_windows=1)
    for layers in MEMORY_LAYERS:
        for checkpointed in (False, True):
            slug, tail = ("-checkpointed", ", checkpointed") if checkpointed else ("", "")
            more = dict(once, layers=layers) | (dict(checkpoint_activations=True) if checkpointed else {})
            add("memory", f"{layers}-layers{slug}", f"{layers} layers, end to end{tail}", baseline=True, **more)
            for B in MEMORY_BLOCKS:
                name, row = f"{layers}-layers-{B}-blocks{slug}", f"{layers} layers, {B} blocks{tail}"
                add("memory", name, row, blocks=B, **more)
    return found


def _flags(values):
    """{name: value} as flags of a command line."""
    flags = []
    for name, value in values.items():
        flags += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return tuple(flags)
