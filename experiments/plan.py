"""How many blocks does a network need to fit into your memory? Counted before training, on any machine:

    python -m experiments.plan gpt --preset paper --dtype bfloat16 --memory 8GB

Flags after the script's name are passed to it. A training step is taken with torch's fake tensors, which have
shapes and types but no numbers. So a step of any size is counted on any machine, in seconds. The counts are those of
nano_db/trainer/memory.py.
"""

import math
import re
from dataclasses import replace
from itertools import product

from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.benchmark import script_and_settings
from nano_db.errors import UsageError
from nano_db.partition import Partition, make_partition, split_layers
from nano_db.trainer.command import command
from nano_db.trainer.memory import PARTS, training_bytes
from nano_db.trainer.report import end_to_end
from nano_db.trainer.run import autocast, first_weights, make_optimizer, networks
from nano_db.trainer.settings import Parser

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
CHOSEN_HERE = ("--blocks", "--baseline", "--layer-split", "--checkpoint-activations", "--ensemble", "--only")


def parse_bytes(text):
    """The number of bytes in a text such as "8GB" or "500 MiB". Raises UsageError for any other text."""
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*(\w+)\s*", text)
    if not match or match[2] not in UNITS or not float(match[1]):
        raise UsageError(f"--memory {text}: write it like 8GB; units: {', '.join(UNITS)}")
    return float(match[1]) * UNITS[match[2]]


def largest_network(script, settings, data, levels):
    """The largest network of these settings, in training mode, and a batch for it. data, levels: what script.prepare
    has returned, perhaps for another number of blocks.
    """
    if isinstance(levels, Partition):  # where the edges are makes no difference to the bytes
        levels = make_partition(levels.noise, networks(settings))
    shared, b = (data, levels), 0
    if networks(settings) > 1 and not settings.baseline:
        layers = split_layers(settings.layers, settings.blocks, getattr(settings, "layer_split", ""))
        b = layers.index(max(layers))
    network = first_weights(script.build, b, settings, *shared).train()
    return network, script.batch(settings.batch_size, settings, *shared)


def step_bytes(script, settings, *shared):
    """Bytes by part (trainer/memory.py) of a training step of the largest network, counted on the CPU: a GPU may be
    too small even for the weights. For the arguments see largest_network.
    """
    settings = replace(settings, device="cpu")
    network, batch = largest_network(script, settings, *shared)
    mode = FakeTensorMode()
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: mode.from_tensor(t) for name, t in tensors.items() if t is not None}
    with mode:
        batch = [mode.from_tensor(t) for t in batch]
        return training_bytes(network, batch, make_optimizer(network, settings), autocast(settings))


def plans(name, flags):
    """Yield (B, checkpointed, bytes by part) of training in B blocks, B = 1 being the end-to-end network. If several B
    have equally deep largest blocks, only the smallest B is tried.
    """
    no_text = name == "gpt" and re.search(r"--preset[ =]paper\b", " ".join(flags))  # this preset names none
    script, settings = script_and_settings(name, [*(["--data", "pydocs"] if no_text else []), *flags])
    shared = script.prepare(end_to_end(settings))  # which may sample in fewer steps than there are blocks
    fewest = {math.ceil(settings.layers / blocks): blocks for blocks in range(settings.layers, 0, -1)}  # by depth
    for blocks, checkpointed in product(sorted(fewest.values()), (False, True)):
        changed = replace(settings, blocks=blocks, checkpoint_activations=checkpointed)
        yield blocks, checkpointed, step_bytes(script, changed if blocks > 1 else end_to_end(changed), *shared)


def main():
    parser = Parser(prog="python -m experiments.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("script", choices=("vit", "dit", "mdm", "gpt"), help="train_<script>.py; its flags may follow")
    parser.add_argument("--memory", help="memory available, like 8GB")
    args, flags = parser.parse_known_args()
    room = parse_bytes(args.memory) if args.memory else math.inf
    for flag in (argument.split("=")[0] for argument in flags):  # "--blocks 4" and "--blocks=4"
        if flag in CHOSEN_HERE:
            raise UsageError(f"{flag} is for this command to choose: drop it")

    fitting, smallest = {}, math.inf
    for blocks, checkpointed, count in plans(args.script, flags):
        if smallest == math.inf:  # the first: no flag is wrong
            print(f"MiB of a training step{'':9}" + "".join(f"{part:>13}" for part in (*PARTS, "total")))
        name = ("end to end" if blocks == 1 else f"{blocks} blocks") + (", checkpointed" if checkpointed else "")
        print(f"  {name:29}" + "".join(f"{count[part] / 2**20:13,.1f}" for part in (*PARTS, "total")), flush=True)
        smallest = min(smallest, count["total"])
        if count["total"] <= room:
            fitting.setdefault(checkpointed, name)
    if not fitting:
        advice = "try a smaller --batch-size, or a narrower network"
        raise UsageError(f"--memory {args.memory}: nothing fits; the minimum is {smallest / 2**20:,.1f} MiB: {advice}")
    if args.memory:
        enough = "; or ".join(fitting[key] for key in sorted(fitting))
        print(f"{args.memory} ({room / 2**20:,.1f} MiB): enough for {enough}")


if __name__ == "__main__":
    command(main)
