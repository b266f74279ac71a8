"""What it costs to use a trained network, for one sample (an image, or some text): layers evaluated, seconds, and bytes
in memory.
"""

import statistics
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nano_db.layers import Layer


class PeakBytes(TorchDispatchMode):
    """Within this context, `peak` is the most bytes that tensors made here have held at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {self._storage(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                storage = self._storage(leaf)
                if storage not in known and storage not in self.seen:  # neither a view, nor in place
                    self.seen[storage] = True
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    @staticmethod
    def _storage(tensor):
        return tensor.untyped_storage()

    def _add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


def count_layers(networks, use):
    """Layer evaluations while use() runs, summed over the samples of each call's batch."""
    evaluations = 0

    def hook(layer, args):
        nonlocal evaluations
        evaluations += len(args[0])

    layers = [m for network in networks for m in network.modules() if isinstance(m, Layer)]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        use()
    finally:
        for handle in handles:
            handle.remove()
    return evaluations


def seconds_of(use, device):
    """Seconds that use() takes."""
    clock = time.perf_counter()
    use()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def cost_of_use(networks, use, device, count=16):
    """Cost of one sample, as a dictionary. use(networks, n): makes n samples (classifies, paints or writes).

    seconds: of a batch of `count`, the median of three, divided by it. weights: bytes of the largest network, for more
    than one at a time need not be in memory. tensors: the most bytes that the computation of one sample held at a time.
    """
    with PeakBytes() as tensors:
        evaluations = count_layers(networks, lambda: use(networks, 1))
    use(networks, count)  # to warm up
    seconds = statistics.median(seconds_of(lambda: use(networks, count), device) for _ in range(3)) / count
    weights = max(sum(t.nbytes for t in (*network.parameters(), *network.buffers())) for network in networks)
    return {"layer_evaluations": evaluations, "seconds": seconds, "weights": weights, "tensors": tensors.peak}


def cost_table(columns):
    """Lines of a text table: a row a figure of one sample, a column for each {name: cost_of_use}; ratios to the
    last.
    """
    *_, last = columns.values()
    units = {"layer_evaluations": ("layers evaluated", 1), "seconds": ("milliseconds", 1000)}
    units |= {"weights": ("MiB of weights", 2**-20), "tensors": ("MiB of tensors", 2**-20)}
    lines = [f"{'for one sample':18}" + "".join(f"{name:>22}" for name in columns)]
    for figure, (label, unit) in units.items():
        cells = [f"{cost[figure] * unit:11.2f} ({cost[figure] / last[figure]:6.3f})" for cost in columns.values()]
        lines.append(f"{label:18}" + "".join(f"{cell:>22}" for cell in cells))
    return lines
