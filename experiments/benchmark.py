"""Time blocks against the end-to-end network, and count their memory, without a training run:

    python -m experiments.benchmark gpt --pairs 20 --blocks 4

Flags after the script's name are passed to it.
"""

import statistics
import tempfile
from importlib import import_module

import torch

from nano_db.errors import UsageError
from nano_db.trainer.command import command
from nano_db.trainer.distributed import is_one_of_several
from nano_db.trainer.report import costs_of, end_to_end, print_costs, seconds_of
from nano_db.trainer.run import autocast, first_weights, learning_rate, make_optimizer, networks, seed_from
from nano_db.trainer.settings import Parser, read_settings


def script_named(name):
    """train_<name>.py as a module."""
    return import_module(f"train_{name}")


def script_and_settings(name, flags):
    """The module, and its settings for these flags. Raises UsageError where the script does."""
    script = script_named(name)
    for flag in (argument.split("=")[0] for argument in flags):
        if flag in ("--out", "--eval-only", "--init-from", "--only"):
            raise UsageError(f"{flag} has no effect here, where no run is made: drop it")
    with tempfile.TemporaryDirectory() as folder:  # in which no run has left settings to resume with
        flags, recipes = [*flags, "--out", folder], getattr(script, "RECIPES", None)
        return script, read_settings(name, script.Settings, script.PRESETS, recipes, flags=flags)


def take_step(script, network, optimizer, settings, shared):
    """One training step, as in the scripts. Returns its loss, and the norm of the gradient."""
    with autocast(settings):
        loss = network.loss(*script.batch(settings.batch_size, settings, *shared))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


class Contestant:
    """Networks that are trained in turn: all blocks, or the end-to-end network."""

    def __init__(self, script, settings, shared):
        self.script, self.settings, self.shared = script, settings, shared
        self.networks = [first_weights(script.build, b, settings, *shared) for b in range(networks(settings))]
        self.optimizers = [make_optimizer(network, settings) for network in self.networks]
        if settings.compile:
            for network in self.networks:
                network.network.compile()

    def train(self, step):
        """One step of each network, as in the scripts."""
        settings = self.settings
        for b, (network, optimizer) in enumerate(zip(self.networks, self.optimizers, strict=True)):
            network.train()
            seed_from(settings.seed, b, step)
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(step, settings)
            take_step(self.script, network, optimizer, settings, self.shared)

    def sample(self, step):
        """Sixteen samples."""
        for network in self.networks:
            network.eval()
        with autocast(self.settings):
            self.script.sample(self.networks, 16, self.settings, *self.shared)


def time_pairs(works, pairs, settings):
    """Time two functions of the step alternately: (their median seconds, quartiles of the ratio of the first to the
    second). Ratios are taken within a pair of timings, because the speed of a machine drifts.
    """
    times = [[seconds_of(settings, work, step) for work in works] for step in range(pairs + 2)][2:]  # warm-up left out
    ratios = [a / b for a, b in times]
    quartiles = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    return [statistics.median(side) for side in zip(*times, strict=True)], quartiles


def compare(label, works, pairs, settings):
    """Time two functions and print the result."""
    (ours, theirs), (low, middle, high) = time_pairs(works, pairs, settings)
    seconds = f"{1000 * ours:.1f} ms, end to end {1000 * theirs:.1f} ms"
    print(f"{label} {seconds}; ratio in pairs {middle:.3f} (quartiles {low:.3f}, {high:.3f})")


def main():
    scripts = ("vit", "dit", "mdm", "gpt", "looped")
    parser = Parser(prog="python -m experiments.benchmark", description=__doc__, allow_abbrev=False)
    parser.add_argument("script", choices=scripts, help="train_<script>.py; its flags may follow")
    parser.add_argument("--pairs", type=int, default=20, help="how many pairs to time (default %(default)s)")
    args, flags = parser.parse_known_args()
    if args.pairs < 1:
        raise UsageError(f"--pairs must be at least 1, not {args.pairs}")
    if "--baseline" in flags:
        raise UsageError("--baseline: drop this flag; the end-to-end network is timed anyway")
    if is_one_of_several():
        raise UsageError("a benchmark times a single process: start it without torchrun")
    script, settings = script_and_settings(args.script, flags)
    shared = script.prepare(settings)
    whole = end_to_end(settings)
    costs = {  # before the timed networks exist: they would count in a GPU's peak
        "blocks": costs_of(settings, script.build, script.batch, script.sample, *shared),
        "end to end": costs_of(whole, script.build, script.batch, script.sample, *shared),
    }
    blocks, baseline = Contestant(script, settings, shared), Contestant(script, whole, shared)
    compare(f"a step of all {len(blocks.networks)} blocks", (blocks.train, baseline.train), args.pairs, settings)
    print_costs(costs)
    compare("16 samples with blocks", (blocks.sample, baseline.sample), args.pairs, settings)


if __name__ == "__main__":
    command(main)
