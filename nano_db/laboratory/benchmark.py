"""What training and use cost, in bytes and seconds, at the end of a run (race.py and plan.py: without one)."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from nano_db.errors import is_out_of_memory
from nano_db.layers import Layer
from nano_db.machinery.files import write_json
from nano_db.machinery.memory import training_bytes
from nano_db.machinery.run import VERSIONS, Run, make_optimizer


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

    def report(self, metrics, metric, unit):
        """Write result.json and curves.png, print what training and a sample cost, and name the run's files.

        metrics: the script's own; `metric` (in `unit`) is drawn over the rounds. memory_bytes and seconds_per_step are
        the largest block's (or the baseline's); the sum over the blocks stands beside.
        """
        run, settings = self.run, self.run.settings
        make = self.make_baseline if settings.baseline else self.make_block
        costs = {settings.method: self.costs(make, run.count)}
        seconds = [(state := run.load_block(b, whole=False))["seconds"] / state["step"] for b in range(run.count)]
        result = {"script": run.script, "method": settings.method, "blocks": run.count, "steps": settings.steps}
        result |= {"seed": settings.seed, "device": run.device, "versions": VERSIONS, "metrics": metrics}
        result["settings"] = asdict(settings)  # what was evaluated: config.json has those of the run's first command
        result |= {"seconds_per_step": max(seconds), "seconds_per_step_all_blocks": sum(seconds)}
        result |= costs[settings.method]
        write_json(run.folder / "result.json", result)
        if not settings.baseline:  # the network that blocks are there to avoid: it may be too large for this machine
            try:
                costs["end to end"] = self.costs(self.make_baseline, 1)
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

    def build_all(self, make, count):
        return [self.run.build(make, b) for b in range(count)]

    def costs(self, make, count):
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
        use = self._cost_of_use(self.build_all(make, count))
        return {"parameters": parameters, "memory_bytes": largest, "one_sample": use}

    def _cost_of_use(self, networks, count=16):
        """Cost of one sample, as a dictionary; it does not depend on the weights.

        seconds: of a batch of `count`, the median of three, divided by it. weights: bytes of the largest network, for
        more than one at a time need not be in memory.
        """
        networks = [network.eval() for network in networks]
        with self.run.autocast:
            evaluations = count_layers(networks, lambda: self.sample(networks, 1))
            self.sample(networks, count)  # to warm up
            seconds = statistics.median(self.seconds_of(lambda: self.sample(networks, count)) for _ in range(3)) / count
        weights = max(sum(t.nbytes for t in (*network.parameters(), *network.buffers())) for network in networks)
        return {"layer_evaluations": evaluations, "seconds": seconds, "weights": weights}

    def seconds_of(self, work):
        clock = time.perf_counter()
        work()
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - clock


def print_costs(costs):
    """Two tables of text, with ratios to the last column in brackets. costs: {column: what Bench.costs returns}."""
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
