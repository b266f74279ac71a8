"""Time blocks against the end-to-end network, and count bytes, without a run:

    python -m nano_db.laboratory.race gpt --pairs 20 --blocks 4

What follows the script's name are its own flags.
"""

import statistics
import sys
import tempfile
from functools import partial
from importlib import import_module
from unittest.mock import patch

import torch

from nano_db.errors import UsageError
from nano_db.laboratory.benchmark import Bench, print_costs
from nano_db.laboratory.results import ROOT
from nano_db.machinery.run import command, learning_rate, make_optimizer, seed_from
from nano_db.machinery.settings import Parser

SCRIPTS = ("vit", "dit", "mdm", "gpt", "looped")


class _Ready(Exception):
    """Carries a Bench out of a script's main()."""


def module_of(script):
    """train_<script>.py as a module. Scripts lie beside the package, not in it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return import_module(f"train_{script}")


def bench_of(script, flags):
    """The Bench that train_<script>.py makes for these flags, before it trains anything. Raises what the script raises,
    such as UsageError for a flag.
    """
    module = module_of(script)

    def make(*parts):
        raise _Ready(Bench(*parts))

    with tempfile.TemporaryDirectory() as folder:  # nothing is there to go on from, and nothing is written
        line = [f"train_{script}.py", *flags, "--out", folder]
        with patch.object(module, "Bench", make), patch.object(sys, "argv", line):
            try:
                module.main()
            except _Ready as ready:
                return ready.args[0]


def take_step(bench, module, optimizer, b, step):
    """The training step of the scripts."""
    settings = bench.run.settings
    seed_from(settings.seed, b, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    with bench.run.autocast:
        loss = module.loss(*bench.batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
    optimizer.step()
    optimizer.zero_grad()


def race(bench, pairs):
    """Print the seconds of one step of every block against one step of the baseline, and of samples; and bytes.

    Timings drift with the machine, so both take turns, and what counts is the ratio within each pair.
    """
    run = bench.run
    if run.worker.ranks > 1:
        raise UsageError("a race times a single process: start it without torchrun")
    blocks, baseline = bench.build_all(bench.make_block, run.count), bench.build_all(bench.make_baseline, 1)
    optimizers = {module: make_optimizer(module, run.settings) for module in (*blocks, *baseline)}
    if run.settings.compile:
        for module in optimizers:
            module.network.compile()

    def train(modules, step):
        for b, module in enumerate(modules):
            take_step(bench, module.train(), optimizers[module], b, step)

    def sample(modules, step):
        with run.autocast:
            bench.sample([module.eval() for module in modules], 16)

    def in_pairs(label, work):
        sides = [partial(work, blocks), partial(work, baseline)]
        times = [[bench.seconds_of(partial(side, step)) for side in sides] for step in range(pairs + 2)][2:]  # warm
        ours, theirs = (f"{1000 * statistics.median(side):.1f} ms" for side in zip(*times, strict=True))
        ratios = [a / b for a, b in times]
        low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
        ratio = f"ratio in pairs {middle:.3f} (quartiles {low:.3f}, {high:.3f})"
        print(f"{label} {ours}, end to end {theirs}; {ratio}")

    in_pairs(f"a step of all {run.count} blocks", train)
    costs = {"blocks": bench.costs(bench.make_block, run.count), "end to end": bench.costs(bench.make_baseline, 1)}
    print_costs(costs)
    in_pairs("16 samples with blocks", sample)


def main():
    parser = Parser(prog="python -m nano_db.laboratory.race", description=__doc__, allow_abbrev=False)
    parser.add_argument("script", choices=SCRIPTS, help="train_<script>.py; its flags may follow")
    parser.add_argument("--pairs", type=int, default=20, help="how many pairs to time (default %(default)s)")
    args, flags = parser.parse_known_args()
    if args.pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {args.pairs}")
    if "--baseline" in flags:
        raise UsageError("--baseline: blocks are timed against it, so drop it")
    race(bench_of(args.script, flags), args.pairs)


if __name__ == "__main__":
    command(main)
