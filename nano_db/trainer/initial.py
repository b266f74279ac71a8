"""--init-from: a run that starts from the weights of another.

With the same method and number of networks, each network continues from its own weights. An end-to-end network can also
be cut: its layers are divided among the blocks.
"""

import hashlib
import os
import re
from dataclasses import fields
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.layers import open_gates
from nano_db.trainer.checkpoints import differences, explained, read_block, read_config, require
from nano_db.trainer.settings import Discrete

MAY_DIFFER = ("noise", "overlap", "partition", "p_mean", "sigma_data", "schedule")  # networks adapt, but a line says so


def initial_weights(settings, b=0):
    """(weights, sha256, state) of network b of the run to start from: the weights (averaged, if there is an average),
    their checksum, and the contents of its file.
    """
    path, sha256 = Path(settings.init_from) / f"block_{b}.pt", hashlib.sha256()
    if not os.path.exists(path):
        raise UsageError(
            f"--init-from: {path} is missing, and a block that has not begun needs it: train that run first"
        )
    state = read_block(path)
    weights = state["ema"] or state["weights"]
    with explained(f"--init-from: {path} holds no weights"):
        for name, tensor in sorted(weights.items()):
            sha256.update(name.encode() + tensor.numpy().tobytes())
    return weights, sha256.hexdigest(), state


def initial_checksums(settings, count, keeps, fixed):
    """The checksums of the networks to start from, separated by spaces: one for each network of this run, or a single
    one to be cut. A run that has begun has them in its config.json, and the networks may be gone.

    count, keeps, fixed: the Run's. Raises UsageError unless --init-from is a finished run of the same script, version
    and network, whose data has the same vocabulary, or images of the same shape and number of classes.
    """
    if found := stored_checksums(settings, count):
        return found
    config = read_config(settings.init_from, "--init-from")
    if config["script"] != fixed["script"]:
        raise UsageError(f"--init-from {settings.init_from} holds a run of train_{config['script']}.py")
    networks = [facts(settings, 0)]
    _, there, _ = networks[0]
    cut = there.get("baseline") is True and not settings.baseline and hasattr(settings, "layers")
    different = differences(there, needed(settings, fixed, cut))
    different += other_data(config["keeps"], keeps)
    if different:
        different = differences(config["settings"], {"preset": settings.preset}) + different
        needs = f"needs a run of the same script, version and network ({'; '.join(different)})"
        raise UsageError(f"--init-from {settings.init_from} does not fit: it {needs}")
    others = differences(there, {name: fixed[name] for name in MAY_DIFFER if name in fixed and name in there})
    others += differences(config["keeps"], {name: keeps[name] for name in ("classes",) if name in keeps})
    if others:
        print(f"--init-from {settings.init_from} was trained differently: {'; '.join(others)}")
    networks += [facts(settings, b) for b in range(1, 1 if cut else count)]
    for b, (_, own, step) in enumerate(networks):
        if own != there:
            raise UsageError(f"--init-from {settings.init_from}: block_{b}.pt and block_0.pt are from different runs")
        if step != there.get("steps"):
            reached = f"block {b} is at step {step} of {there.get('steps')}"
            raise UsageError(f"--init-from {settings.init_from} is not finished: {reached}")
    return " ".join(sha256 for sha256, _, _ in networks)


def facts(settings, b):
    """(sha256, settings, step) of network b of the run to start from, whose weights need not stay in memory."""
    _, sha256, state = initial_weights(settings, b)
    return sha256, state["settings"], state["step"]


def stored_checksums(settings, count):
    """The checksums in the config.json of a run that has begun; "" for a new run. count: of its networks."""
    if not os.path.exists(Path(settings.out) / "config.json"):
        return ""
    if os.path.realpath(settings.out) == os.path.realpath(settings.init_from):
        raise UsageError(f"--init-from {settings.init_from} is --out itself: give the new run another --out")
    config = read_config(settings.out)
    if config["settings"].get("init_from") != settings.init_from:  # Run will refuse it, and say so
        return ""
    with explained(f"{settings.out}/config.json is damaged: move the folder away, or choose another --out"):
        found = config["depends_on"]["init_from_sha256"]
        require(len(found.split()) in (1, count) and int(found[:8], 16) >= 0)
    return found


def needed(settings, fixed, cut):
    """The part of `fixed` that the networks to start from must agree with: what shapes them, and the seed where it
    makes the target embeddings. cut: a whole network is cut into blocks, so their layer_split need not agree.
    """
    names = {"tokenizer", "baseline"}
    names |= {"ensemble"} if settings.baseline else {"blocks", "head"}
    names |= {"seed"} if isinstance(settings, Discrete) and not settings.baseline else set()
    shapes = {f.name for f in fields(settings) if f.metadata["group"] == "network" and not (cut and f.metadata["of"])}
    names = shapes | {"script", "version"} | ({"tokenizer"} if cut else names)
    return {name: fixed[name] for name in fixed if name in names} | ({"ensemble": 1} if cut else {})


def other_data(there, here):
    """In words, the differences in data that shape a network. there, here: what runs keep of their data (Run)."""
    different = []
    if there.get("vocabulary") != here.get("vocabulary"):
        different.append("another vocabulary there")
    if there.get("shape") != here.get("shape"):
        different.append(f"images of shape {there.get('shape')} there, {here.get('shape')} here")
    classes = [len(keeps.get("classes", ())) for keeps in (there, here)]  # as many others may replace them
    if classes[0] != classes[1]:
        different.append(f"{classes[0]} classes there, {classes[1]} here")
    return different


def layers_of(network, own, first):
    """`own`, the initial weights of a block, replaced by those of the trained `network`: its layers from number `first`
    on, and what surrounds them. Both are state_dicts. What the network lacks, or has in another shape, stays as it is:
    a denoising head, say. But a layer that is modulated only in the block gets open gates: with gates of zero it would
    do nothing. And since fewer layers divide their branches by less (layers.Layer), weights that write to the residual
    stream are scaled down here to compensate.
    """
    begun, rescale = {}, (depth_of(own) / depth_of(network)) ** 0.5
    for name, weight in own.items():
        there = re.sub(r"^network\.layers\.(\d+)", lambda found: f"network.layers.{first + int(found[1])}", name)
        fits = there in network and network[there].shape == weight.shape
        begun[name] = network[there] if fits else weight
        if fits and re.fullmatch(r"network\.layers\.\d+\.(attention\.out|mlp\.2)\.weight", there):
            begun[name] = rescale * network[there]
        layer = re.fullmatch(r"(network\.layers\.\d+)\.modulation\.bias", there)
        if layer and there not in network and f"{layer[1]}.attention.qkv.weight" in network:
            begun[name] = open_gates(weight)
    return begun


def depth_of(weights):
    """The number of layers of the network with this state_dict; at least 1."""
    return len({found[1] for name in weights if (found := re.match(r"network\.layers\.(\d+)\.", name))}) or 1
