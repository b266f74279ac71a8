"""The experiments behind the tables of results: the rows of each table, and the flags of each row.

The rows of a table have the same flags but for what a row is named after. N steps of the baseline stand against N steps
of every block, in which as many layers are evaluated (the paper's budget rule). Rows of more steps say so.
"""

import shlex
from dataclasses import dataclass
from functools import partial

FOR_ALL = {  # flags of all runs of a scale; below, those of each table. Baselines go without `blocks` and `overlap`
    "tiny": dict(preset="tiny", device="cpu", steps=10, samples=0),
    "cpu": dict(device="cpu"),
    "gpu": dict(preset="gpu", samples=0),
}
SCALES = {  # a table "vit-..." has the flags of "vit", but for those in its own entry; None: without that flag
    "tiny": {  # for tests: seconds a run
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
        "dit-ablations": dict(frechet_images=0), "vit-levers": dict(layers=6),
        "mdm-steps": dict(layers=6, width=None), "gpt-ablations": dict(layers=8, width=None),
        "memory": dict(width=None),
    },
    "gpu": {
        "vit": dict(layers=12, blocks=3, steps=10_000, warmup=500), "dit": dict(layers=12, blocks=3),
        "mdm": dict(data="shakespeare", layers=12, blocks=3, steps=5000, warmup=250),
        "gpt": dict(data="shakespeare", layers=12, blocks=4, rounds=1),
        "looped": dict(data="shakespeare", steps=800, warmup=40),
        "dit-ablations": dict(steps=5000, warmup=250, ema=0.998, frechet_images=0),
    },
}  # fmt: skip
GROUPS = {  # the tables: their titles, and what to know of them; first what the paper has in their place
    "vit": ("Vision transformer", "The paper: CIFAR-100, 12 layers of width 128, patch 4, 3 blocks; accuracy in %."),
    "dit": ("Diffusion transformer", "The paper: CIFAR-10, DiT-S/2, 3 blocks; FID, which frechet_small is not."),
    "mdm": ("Masked diffusion", "The paper: text8, 12 layers of width 768, 3 blocks; bits per character."),
    "gpt": ("Autoregressive transformer", "The paper: LM1B and OpenWebText (OWT), 12 layers of width 768, 4 blocks; "
            "MAUVE of samples (higher is better), no likelihood."),
    "looped": ("Looped transformer", "The paper: LM1B, 2 + 4 + 2 layers of width 512; MAUVE of samples. Nothing is "
               "partitioned: B = 1, and the control of a block's size is a plain transformer of all layers."),
    "dit-ablations": ("Partition, overlap and number of blocks", "The paper: DiT-S/2, CIFAR-10, FID (tables 2, 7, A2). "
                      "A row differs from the first, which has 3 blocks and no overlap, in what it names."),
    "vit-levers": ("Vision transformer: what would help shallow blocks", "Ours. Blocks of 2 layers in a network of 6. "
                   "A row differs from the first, or from the end-to-end network, in what it names."),
    "gpt-ablations": ("Head, loss weight and noise", "Ours. 8 layers of width 128. In all rows but the last the block "
                      "at work answers alone (`--walk last`). A row differs from the first in what it names."),
    "vit-depth": ("How deep must a block be? Vision transformer", "Ours: 12 layers in all. A row of blocks stands "
                  "beside a plain network of as many layers as one of them has."),
    "dit-depth": ("How deep must a block be? Diffusion transformer", "Alike."),
    "gpt-depth": ("How deep must a block be? Autoregressive transformer", "Alike."),
    "mdm-steps": ("Masked diffusion: quality against steps", "Ours. 6 layers of width 128. In each run the learning "
                  "rate falls to its end."),
    "memory": ("Memory against depth and number of blocks", "One training step."),
}  # fmt: skip
MEMORY_LAYERS, MEMORY_BLOCKS = (4, 8, 12), (2, 4)
DEPTHS = (1, 2, 3, 4, 6, 12)  # layers of a block, of 12
MDM_TIMES = (0.5, 1, 2)  # the steps of the rows of mdm-steps, in those of the table mdm


@dataclass(frozen=True)
class Experiment:
    """A row of a table: train_<script>.py with `flags`, and --seed 0, 1, ... seeds - 1."""

    name: str  # its files are <name>-s<seed>.json
    group: str  # the table it stands in, a key of GROUPS
    row: str  # what the table calls it
    script: str
    flags: tuple[str, ...]
    seeds: int
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


def script_of(table):
    """The script whose runs the rows of a table are."""
    return "gpt" if table == "memory" else table.split("-")[0]


def experiments(scale):
    """All experiments of a scale, tables in the order of GROUPS.

    A row with the flags of one of an earlier table has its name, seeds and files, too.
    """
    found, seeds = [], 2 if scale == "tiny" else 3
    saving = dict(checkpoint_activations=True)

    def usual(table):
        return FOR_ALL[scale] | SCALES[scale][script_of(table)] | SCALES[scale].get(table, {})

    def longer(table, times):
        return {name: round(times * usual(table)[name]) for name in ("steps", "warmup")}

    def add(group, slug, row, paper="", seeds=1, **changes):
        script, flags = script_of(group), []
        for name, value in (usual(group) | changes).items():
            if not (value is None or (changes.get("baseline") and name in ("blocks", "overlap"))):
                flags += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        same = next((e for e in found if (e.script, e.flags) == (script, tuple(flags))), None)
        name, seeds = (same.name, same.seeds) if same else (f"{group}-{slug}", seeds)
        found.append(Experiment(name, group, row, script, tuple(flags), seeds, paper))

    papers = {"vit": ("60.25", "59.30"), "dit": ("39.83", "37.20"), "mdm": ("1.56", "1.45")}
    papers["gpt"] = ("LM1B 0.50, OWT 0.85", "LM1B 0.71, OWT 0.82")
    for group, (whole, cut) in papers.items():
        B, deep = usual(group)["blocks"], usual(group)["layers"]
        shallow = dict(baseline=True, layers=deep // B)
        add(group, "baseline", "end to end", whole, seeds, baseline=True)
        if group in ("vit", "gpt"):
            add(group, "nano", f"{B} blocks, recipe nano", "", seeds, recipe="nano")
            add(group, "paper", f"{B} blocks, recipe paper", cut, recipe="paper")
        else:
            add(group, "blocks", f"{B} blocks", cut, seeds)
        add(group, "shallow", f"control: one network of {deep // B} layers", "", seeds, **shallow)
        add(group, "ensemble", f"control: mean of {B} such networks", "", seeds, **shallow, ensemble=B)
        add(group, "baseline-checkpointed", "end to end, activations checkpointed", baseline=True, **saving)
        add(group, "blocks-checkpointed", f"{B} blocks, activations checkpointed", **saving)

    looped, seven = partial(add, "looped"), longer("looped", 7)
    looped("baseline", "Huginn: about 33 turns a step", "0.49", seeds, baseline=True)
    looped("nano", "one noisy pass, recipe nano", "", seeds, recipe="nano")
    looped("paper", "one noisy pass, recipe paper", "0.70", seeds, recipe="paper")
    row = "one noisy pass, recipe nano, 7 times the steps (about Huginn's seconds)"
    looped("nano-7-times", row, "", seeds, recipe="nano", **seven)
    row = "control: one turn, no noise (a plain transformer of the same layers)"
    looped("one-turn", row, "", seeds, baseline=True, turns=1, calls=1)
    looped("one-turn-7-times", f"{row}, 7 times the steps", "", seeds, baseline=True, turns=1, calls=1, **seven)
    looped("baseline-checkpointed", "Huginn, activations checkpointed", baseline=True, **saving)

    ablation, splits = partial(add, "dit-ablations"), ("4,4,4", "3,6,3", "6,4,2", "2,4,6")
    for partition, label, fids in (
        ("probability", "equal probability", ("38.03", "41.64", "45.42", "40.40")),
        ("uniform", "uniform in ln sigma", ("43.53", "43.59", "47.49", "42.37")),
    ):
        for split, fid in zip(splits, fids, strict=True):
            slug = f"{partition}-{split.replace(',', '')}"
            ablation(slug, f"{label}, layers {split}", fid, partition=partition, layer_split=split, overlap=0.0)
    for overlap, fid in ((0.05, "37.20"), (0.1, "")):
        ablation(f"overlap-{overlap}", f"overlap {overlap:g}", fid, overlap=overlap)
    ablation("1-block", "1 block (end to end)", "39.83", baseline=True)
    for B, fid in ((2, "35.47"), (4, "45.43"), (6, "53.32")):
        ablation(f"{B}-blocks", f"{B} blocks", fid, blocks=B, overlap=0.0)

    lever, twice = partial(add, "vit-levers"), longer("vit", 2)
    readout, where = ("token", "the label token alone") if scale == "gpu" else ("mean", "the mean of all tokens")
    for method, changes in (("blocks", dict(recipe="nano")), ("end to end", dict(baseline=True))):
        slug = method.replace(" ", "-")
        lever(slug, method, **changes)
        lever(f"readout-{slug}", f"{method}, read off {where}", readout=readout, **changes)
        lever(f"twice-{slug}", f"{method}, twice the steps", **twice, **changes)
    lever("2-blocks", "2 blocks of half the layers", recipe="nano", blocks=2)

    ablation = partial(add, "gpt-ablations", recipe="nano")
    ablation("first", "recipe nano, the block at work alone", walk="last")
    ablation("weight", "loss weighted by w(sigma)", walk="last", loss_weight="edm")
    ablation("noise", "information noise", walk="last", noise="information")
    ablation("head", "the paper's head, two streams", walk="last", head="paper")
    ablation("walk", "the mean of all blocks so far")

    for script in ("vit", "dit", "gpt"):
        deep, alone = usual(script)["layers"], partial(add, f"{script}-depth", baseline=True)
        cut = partial(add, f"{script}-depth", **(dict(recipe="nano") if script != "dit" else {}))
        for depth in DEPTHS:
            row, blocks = f"{depth} layer{'s' * (depth > 1)}", deep // depth
            alone(f"plain-{depth}", f"plain network of {row}", layers=depth)
            if blocks > 1:
                cut(f"blocks-{depth}", f"{blocks} blocks of {row}", blocks=blocks)

    B, deep = usual("mdm-steps")["blocks"], usual("mdm-steps")["layers"]
    for times in MDM_TIMES:
        changes = longer("mdm-steps", times)
        again, many = partial(add, "mdm-steps", **changes), changes["steps"]
        again(f"baseline-{many}", "end to end", baseline=True)
        again(f"blocks-{many}", f"{B} blocks")
        again(f"shallow-{many}", f"control: one network of {deep // B} layers", baseline=True, layers=deep // B)
        row = f"control: mean of {B} such networks"
        again(f"ensemble-{many}", row, baseline=True, layers=deep // B, ensemble=B)

    once = partial(add, "memory", steps=1, warmup=0, eval_windows=1)
    for layers in MEMORY_LAYERS:
        for slug, tail, changes in (("", "", {}), ("-checkpointed", ", checkpointed", saving)):
            name = f"{layers} layers, end to end{tail}"
            once(f"{layers}-layers{slug}", name, baseline=True, layers=layers, **changes)
            for B in MEMORY_BLOCKS:
                name = f"{layers} layers, {B} blocks{tail}"
                once(f"{layers}-layers-{B}-blocks{slug}", name, blocks=B, layers=layers, **changes)
    return found
