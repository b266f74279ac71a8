"""What training and use cost, in bytes and seconds: at the end of a run, or as a race without a run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nano_db.errors import UsageError, is_out_of_memory
from nano_db.layers import Layer
from nano_db.machinery.files import write_json
from nano_db.machinery.memory import training_bytes
from nano_db.machinery.run import VERSIONS, Run, learning_rate, make_optimizer, seed_from


@dataclass
class Bench:
    """Measures the networks of a run (machinery/run.py) and, beside blocks, the end-to-end network.

    make_block(b), make_baseline(b): build them. batch(): the arguments of a training loss, on the device.
    sample(networks, n): classifies, paints or writes n samples.
    """

    run: Run
    make_block: Callable
    make_baseline: Callable
    batch: Callable
    sample: Callable

    def race(self):
        """Print the seconds of one step of every block against one step of the baseline, and of samples; and bytes.

        Timings drift with the machine, so both take turns, and what counts is the ratio within each pair.
        """
        run = self.run
        if run.worker.ranks > 1:
            raise UsageError("--benchmark times a single process: start it without torchrun")
        blocks, baseline = self._build(self.make_block, run.count), self._build(self.make_baseline, 1)
        optimizers = {module: make_optimizer(module, run.settings) for module in (*blocks, *baseline)}
        if run.settings.compile:
            for module in optimizers:
                module.network.compile()

        def train(modules, step):
            for b, module in enumerate(modules):
                self._step(module.train(), optimizers[module], b, step)

        def sample(modules, step):
            self.sample([module.eval() for module in modules], 16)

        self._time_in_pairs(f"a step of all {run.count} blocks", partial(train, blocks), partial(train, baseline))
        costs = {"blocks": self._costs(self.make_block, run.count), "end to end": self._costs(self.make_baseline, 1)}
        print_costs(costs)
        self._time_in_pairs("16 samples with blocks", partial(sample, blocks), partial(sample, baseline))

    def report(self, metrics, metric, unit):
        """Write result.json and curves.png, print what training and a sample cost, and name the run's files.

        metrics: the script's own; `metric` (in `unit`) is drawn over the rounds. memory_bytes and seconds_per_step are
        the largest block's (or the baseline's); the sum over the blocks stands beside.
        """
        run, settings = self.run, self.run.settings
        make = self.make_baseline if settings.baseline else self.make_block
        costs = {settings.method: self._costs(make, run.count)}
        seconds = [(state := run.load_block(b, whole=False))["seconds"] / state["step"] for b in range(run.count)]
        result = {"script": run.script, "method": settings.method, "blocks": run.count, "steps": settings.steps}
        result |= {"seed": settings.seed, "device": run.device, "versions": VERSIONS, "metrics": metrics}
        result |= {"seconds_per_step": max(seconds), "seconds_per_step_all_blocks": sum(seconds)}
        result |= costs[settings.method]
        write_json(run.folder / "result.json", result)
        if not settings.baseline:  # the network that blocks are there to avoid: it may be too large for this machine
            try:
                costs["end to end"] = self._costs(self.make_baseline, 1)
                write_json(
                    run.folder / "result.json",
                    {**result, "baseline_memory_bytes": costs["end to end"]["memory_bytes"]},
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                print("end to end: a training step does not fit into this machine's memory")
        print_costs(costs)

        from nano_db.laboratory.plots import draw_curves  # not at the top: importing matplotlib takes a second

        draw_curves(run.folder, metric, unit, metrics.get("nats_per_block", ()))
        files = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith("."))
        print(f"\n{run.folder}: {', '.join(files)}")

    def _build(self, make, count):
        return [self.run.build(make, b) for b in range(count)]

    def _step(self, module, optimizer, b, step):
        """The training step of the scripts, for timing."""
        seed_from(self.run.settings.seed, b, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.run.settings)
        with self.run.autocast:
            loss = module.loss(*self.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), self.run.settings.clip)
        optimizer.step()
        optimizer.zero_grad()

    def _costs(self, make, count):
        """memory_bytes: of a training step, by part, of the network that takes most. parameters: of all of them.
        one_sample: see _cost_of_use.
        """
        counts, parameters = [], 0
        for b in range(count):  # one at a time: all of them may be more than the machine can train
            network = self.run.build(make, b).train()
            optimizer = make_optimizer(network, self.run.settings)
            counts.append(training_bytes(network, self.batch(), optimizer, self.run.autocast))
            parameters += sum(p.numel() for p in network.parameters())
            del network, optimizer
        largest = max(counts, key=lambda count: count["total"])
        use = self._cost_of_use(self._build(make, count))
        return {"parameters": parameters, "memory_bytes": largest, "one_sample": use}

    def _cost_of_use(self, networks, count=16):
        """Cost of one sample, as a dictionary; it does not depend on the weights.

        seconds: of a batch of `count`, the median of three, divided by it. weights: bytes of the largest network, for
        more than one at a time need not be in memory.
        """
        networks = [network.eval() for network in networks]
        evaluations = count_layers(networks, lambda: self.sample(networks, 1))
        self.sample(networks, count)  # to warm up
        seconds = statistics.median(self._seconds(lambda: self.sample(networks, count)) for _ in range(3)) / count
        weights = max(sum(t.nbytes for t in (*network.parameters(), *network.buffers())) for network in networks)
        return {"layer_evaluations": evaluations, "seconds": seconds, "weights": weights}

    def _seconds(self, work):
        clock = time.perf_counter()
        work()
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - clock

    def _time_in_pairs(self, label, ours, theirs):
        """Time ours(step) and theirs(step), in turns, and print medians and the ratio; the first two pairs warm up."""
        steps = range(self.run.settings.benchmark + 2)
        times = [[self._seconds(partial(side, step)) for side in (ours, theirs)] for step in steps][2:]
        ours, theirs = (f"{1000 * statistics.median(side):.1f} ms" for side in zip(*times, strict=True))
        ratios = [a / b for a, b in times]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        ratio = f"ratio in pairs {middle:.3f} (quartiles {low:.3f}, {high:.3f})"
        print(f"{label} {ours}, end to end {theirs}; {ratio}")


def print_costs(costs):
    """Two tables of text, with ratios to the last column in brackets. costs: {column: what Bench._costs returns}."""
    units = {"layer_evaluations": ("", 1), "seconds": ("ms", 1000)}
    for part, title in (("memory_bytes", "training, the largest network"), ("one_sample", "use, for one sample")):
        print(f"\n{title:32}" + "".join(f"{column:>22}" for column in costs))
        *_, last = (cost[part] for cost in costs.values())
        for figure in last:
            unit, factor = units.get(figure, ("MiB", 2**-20))
            numbers = [cost[part][figure] for cost in costs.values()]
            cells = [f"{number * factor:.2f} {unit} ({number / (last[figure] or 1):.3f})" for number in numbers]
            print(f"  {figure.replace('_', ' '):30}" + "".join(f"{cell:>22}" for cell in cells))


def count_layers(networks, work):
    """Layer evaluations while work() runs, summed over the samples of each call's batch."""
    evaluations = []
    layers = [m for network in networks for m in network.modules() if isinstance(m, Layer)]
    handles = [layer.register_forward_pre_hook(lambda _, args: evaluations.append(len(args[0]))) for layer in layers]
    work()
    for handle in handles:
        handle.remove()
    return sum(evaluations)
