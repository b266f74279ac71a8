"""Experiments of two more scales: other methods beside ours, and blocks cut from trained networks (--init-from)."""

from functools import partial

VIT = dict(layers=6, blocks=3, patch=8, rounds=1, samples=0, overlap=0.05)
TEXT = dict(seq_len=64, batch_size=16, rounds=1, samples=0, eval_windows=128)
MODULES = ("noprop", "greedy", "forward_forward")  # of neighbours/, beside which stands train_vit.py
SCALES = {
    "neighbours": {
        "vit": VIT | dict(batch_size=128, steps=900, warmup=45), **{name: {} for name in MODULES},
        "neighbours-cifar10": dict(data="cifar10", test_images=4000),
    },
    "conversion": {
        "dit": dict(layers=6, blocks=3, patch=8, batch_size=64, samples=0, frechet_images=0, overlap=0.05),
        "mdm": TEXT | dict(layers=6, blocks=3, learning_rate=0.003, overlap=0.05),
        "gpt": TEXT | dict(layers=8, blocks=4, overlap=0.1),
        "vit": VIT | dict(batch_size=64, test_images=1200),
    },
}  # fmt: skip
GROUPS = {
    "neighbours-glyphs": ("Neighbours, on glyphs", "Steps are those of each network that is trained."),
    "neighbours-cifar10": ("Neighbours, on CIFAR-10", "The same comparison, on the first 4,000 test images."),
}
GRADIENTS, FEATURES, SIGNALS = "gradients", "frozen features", "features, no gradients"
NEIGHBOURS = (  # name, row, what passes between blocks, script, flags
    ("end-to-end", "end to end, ViT of 6 layers", GRADIENTS, "vit", dict(baseline=True)),
    ("end-to-end-twice", "the same, twice the steps", GRADIENTS, "vit", dict(baseline=True, steps=1800, warmup=90)),
    ("blocks", "DiffusionBlocks, 3 of 2 layers", "nothing", "vit", dict(recipe="nano")),
    ("blocks-twice", "the same, twice the steps", "nothing", "vit", dict(recipe="nano", steps=1800, warmup=90)),
    ("greedy", "greedy, 3 blocks of 2 layers", FEATURES, "greedy", {}),
    ("greedy-1-ahead", "greedy, 1 layer of look-ahead", FEATURES, "greedy", dict(look_ahead=1)),
    ("greedy-2-ahead", "greedy, 2 layers of look-ahead", FEATURES, "greedy", dict(look_ahead=2)),
    ("noprop-chain", "NoProp's CNN, chain of 4, end to end", GRADIENTS, "noprop", dict(method="backprop")),
    ("noprop-alone", "one of its 4 blocks, end to end", "–", "noprop", dict(method="backprop", blocks=1)),
    ("noprop-dt", "NoProp-DT, 4 blocks", "shared embeddings, output projection", "noprop", dict(method="dt")),
    ("noprop-blocks", "DiffusionBlocks, 4 of that CNN", "nothing", "noprop", dict(method="blocks")),
    ("noprop-ct", "NoProp-CT, one network", "–", "noprop", dict(method="ct", steps=2400, embedding=20, length=4.5)),
    ("noprop-fm", "NoProp-FM, one network", "–", "noprop", dict(method="fm", steps=2400, embedding=20, length=4.5)),
    ("forward-mlp", "Forward-Forward, MLP of 3 layers", SIGNALS, "forward_forward", dict(augment="none", steps=1500)),
    ("forward-vit", "Forward-Forward, ViT of 5 layers", SIGNALS, "forward_forward",
     dict(network="vit", augment="none", steps=700, learning_rate=0.004)),
)  # fmt: skip
ONE_SEED = ("end-to-end-twice", "blocks-twice", "noprop-ct", "noprop-fm", "forward-mlp", "forward-vit")
ON_CIFAR10 = ("noprop-chain", "noprop-dt", "noprop-blocks", "forward-mlp")  # NoProp's paper has CIFAR-10, too
CONVERSION = {"dit": (400, (50, 100, 200, 400)), "mdm": (800, (400,)), "gpt": (400, (200,)), "vit": (900, (450,))}


def add_neighbours(tables):
    for slug, row, passes, script, flags in NEIGHBOURS:
        tables.add("neighbours-glyphs", slug, row, passes, 1 if slug in ONE_SEED else 3, script, **flags)
    for slug, row, passes, script, flags in NEIGHBOURS:
        if slug in ON_CIFAR10:
            tables.add("neighbours-cifar10", slug, row, passes, 1, script, **flags)


def add_conversion(tables):
    """CONVERSION: by script the steps of a network, and further steps: of itself, or of every block."""
    for script, (first, more) in CONVERSION.items():
        add = partial(tables.add, f"{script}-conversion")
        three = 3 if script in ("dit", "gpt") else 1  # a sentence of the README rests on these
        add("network", f"the network, {first} steps", seeds=three, baseline=True, **lasting(script, first))
        start = dict(init_from=f"{{out}}/conversion/{script}-conversion-network-s{{seed}}")
        for steps in more:
            changes = lasting(script, steps)
            if steps < first:
                add(f"further-{steps}", f"the network, {steps} steps more", baseline=True, **start, **changes)
            add(f"nothing-{steps}", f"blocks from nothing, {steps} steps", **changes)
            seeds = three if steps == first / 2 else 1
            add(f"started-{steps}", f"blocks that start from it, {steps} steps", seeds=seeds, **start, **changes)


def lasting(script, steps):
    """The flags of a run of so many steps: a warm-up and a moving average in proportion to them."""
    return dict(steps=steps, warmup=steps // 20) | (dict(ema=1 - 8 / steps) if script in ("dit", "mdm") else {})
