"""How many blocks make a network fit into a memory? Counted before any training, and without that memory:

    python -m nano_db.laboratory.plan gpt --preset paper --dtype bfloat16 --memory 8GB

What follows the script's name are its own flags. A training step is taken with torch's fake tensors, which have shapes
and types but no numbers. So a step of any size is counted on any machine, in seconds. The counts are those of
machinery/memory.py.
"""

import math
import re
from functools import cache
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nano_db import block
from nano_db.errors import UsageError
from nano_db.laboratory.race import bench_of, module_of
from nano_db.machinery.memory import PARTS, training_bytes
from nano_db.machinery.run import command, make_optimizer
from nano_db.machinery.settings import Parser

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
# Of no account for a training step: the text, which preset paper does not name, and the calls, enough for all blocks.
NOT_COUNTED = {"gpt": ["--data", "pydocs"], "looped": ["--data", "pydocs"], "dit": ["--calls", "1000"]}
CHOSEN_HERE = ("--blocks", "--baseline", "--layer-split", "--checkpoint-activations", "--ensemble", "--only")


def parse_bytes(text):
    """Bytes, of a text such as "8GB" or "500 MiB". Raises UsageError for another text."""
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*(\w+)\s*", text)
    if not match or match[2] not in UNITS or not float(match[1]):
        raise UsageError(f"--memory {text}: write it like 8GB; units: {', '.join(UNITS)}")
    return float(match[1]) * UNITS[match[2]]


def step_bytes(make, count, bench):
    """Bytes by part (machinery/memory.py) of a training step of the largest of `count` networks make(b)."""
    networks = (bench.run.build(make, b) for b in range(count))  # with their true weights, but one at a time
    network = max(networks, key=lambda network: sum(p.numel() for p in network.parameters())).train()
    mode, batch = FakeTensorMode(), bench.batch()
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: mode.from_tensor(t) for name, t in tensors.items() if t is not None}
    batch = [mode.from_tensor(t) for t in batch]
    with mode, patch.object(block, "sample_sigma", lambda noise, count, *span, device: torch.ones(count)):
        return training_bytes(network, batch, make_optimizer(network, bench.run.settings), bench.run.autocast)


def plans(script, flags):
    """Yield (B, checkpointed, bytes by part) of training in B blocks, B = 1 being the end-to-end network. Of several B
    whose largest block has as many layers, the least.
    """
    module = module_of(script)
    flags = [*NOT_COUNTED.get(script, ()), *flags]
    slow = {"load_text", "load_images", "neighbour_codes"} & vars(module).keys()
    loaders = {name: cache(vars(module)[name]) for name in slow}

    def count(blocks, *more):
        with patch.multiple(module, **loaders):  # the same data for all B
            bench = bench_of(script, [*flags, "--blocks", str(blocks), *more])
        make = bench.make_block if blocks > 1 else bench.make_baseline
        return bench.run.settings.layers, step_bytes(make, blocks, bench)

    layers, whole = count(1)
    yield 1, False, whole
    yield 1, True, count(1, "--checkpoint-activations")[1]
    depths = [math.ceil(layers / blocks) for blocks in range(1, layers + 1)]
    for blocks in range(2, layers + 1):
        if depths.index(depths[blocks - 1]) == blocks - 1:
            yield blocks, False, count(blocks)[1]
            yield blocks, True, count(blocks, "--checkpoint-activations")[1]


def main():
    parser = Parser(prog="python -m nano_db.laboratory.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("script", choices=("vit", "dit", "mdm", "gpt"), help="train_<script>.py; its flags may follow")
    parser.add_argument("--memory", help="what there is, like 8GB")
    args, flags = parser.parse_known_args()
    room = parse_bytes(args.memory) if args.memory else math.inf
    for flag in CHOSEN_HERE:
        if flag in flags:
            raise UsageError(f"{flag} is for this command to choose: drop it")

    print(f"MiB of a training step{'':9}" + "".join(f"{part:>13}" for part in (*PARTS, "total")))
    fitting, least = {}, math.inf
    for blocks, checkpointed, count in plans(args.script, flags):
        name = ("end to end" if blocks == 1 else f"{blocks} blocks") + (", checkpointed" if checkpointed else "")
        print(f"  {name:29}" + "".join(f"{count[part] / 2**20:13,.1f}" for part in (*PARTS, "total")), flush=True)
        least = min(least, count["total"])
        if count["total"] <= room:
            fitting.setdefault(checkpointed, name)
    if not fitting:
        advice = "try a smaller --batch-size, or a narrower network"
        raise UsageError(f"--memory {args.memory}: nothing fits; the least is {least / 2**20:,.1f} MiB: {advice}")
    if args.memory:
        print(f"{args.memory}: enough for {'; or '.join(fitting[key] for key in sorted(fitting))}")


if __name__ == "__main__":
    command(main)
