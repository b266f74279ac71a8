"""Blocks that begin with the layers of a trained network (--start-from): which run will do, and what they take of it.

The run that begins keeps the checksum of the network's weights in its config.json and in its block files. A block that
has a file of its own goes on without the network; one that has none yet is refused if the weights are others by now.
"""

import hashlib
from dataclasses import fields
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.machinery.files import differences, identity, read_block, read_config
from nano_db.partition import begin_with, split_layers


def network_weights(folder):
    """(The weights, the step) of the run in `folder`: averaged weights where there are such, as in an evaluation."""
    path = Path(folder) / "block_0.pt"
    if not path.exists():
        raise UsageError(f"--start-from {folder}: {path} is missing, and a block that has not begun yet needs it")
    state = read_block(path)
    return state["ema"] or state["weights"], state["step"]


def checksum(weights):
    sha256 = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha256.update(name.encode() + tensor.numpy().tobytes())
    return sha256.hexdigest()


def start_checksum(settings, script, depends_on):
    """The checksum of the network to start from. If the run has begun with the same --start-from, it stands in its
    config.json, and the network may be gone; else it is made here. Raises UsageError for a network whose run is not
    finished, not end to end, or of another script, network or data.
    """
    if (Path(settings.out) / "config.json").exists():
        config = read_config(settings.out)
        if config["settings"].get("start_from") == settings.start_from:
            return config["depends_on"].get("start_from_sha256")
    folder, flag = Path(settings.start_from), f"--start-from {settings.start_from}"
    if not (folder / "config.json").exists():
        raise UsageError(f"{flag}: that folder holds no run (no config.json)")
    there = identity(read_config(folder))
    if there["script"] != script:
        raise UsageError(f"{flag} is a run of train_{there['script']}.py, and no network for train_{script}.py")
    if not there.get("baseline"):
        raise UsageError(f"{flag} is a run of blocks: name one that was trained end to end (--baseline)")
    shape = [f for f in fields(settings) if f.metadata["group"] in ("network", "method") and not f.metadata["of"]]
    here = {f.name: getattr(settings, f.name) for f in shape if f.name != "baseline"}
    if hasattr(settings, "tokenizer"):
        here["tokenizer"] = settings.tokenizer
    if there.get("data_sha256") != depends_on["data_sha256"]:
        here |= {"data": settings.data, "data_sha256": depends_on["data_sha256"]}
    if different := differences(there, here):
        raise UsageError(f"{flag} is a run of another network or of other data: {'; '.join(different)}")
    weights, step = network_weights(folder)
    if step != there.get("steps"):
        raise UsageError(f"{flag} is not finished: it stands at step {step} of {there.get('steps')}")
    return checksum(weights)


def begin(module, b, run):
    """Give block b of a run what it takes of the network that the run starts from."""
    settings = run.settings
    weights, _ = network_weights(settings.start_from)
    if checksum(weights) != run.fixed["start_from_sha256"]:
        raise UsageError(f"--start-from {settings.start_from}: its weights are not those with which this run began")
    first = 0
    if not settings.baseline:  # of which each begins with all layers
        first = sum(split_layers(settings.layers, settings.blocks, getattr(settings, "layer_split", ""))[:b])
    module.load_state_dict(begin_with(module.state_dict(), weights, first))
