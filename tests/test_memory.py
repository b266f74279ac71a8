import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, SMALL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_dit
import train_gpt
import train_mdm
import train_vit
from nano_db import heads
from nano_db.block import DiffusionBlock, EndToEnd
from nano_db.heads import DenoisingHead, PosteriorHead, make_target_embeddings
from nano_db.layers import Layer, checkpoint_layers
from nano_db.schedule import LogNormal
from nano_db.trainer.memory import training_bytes
from nano_db.trainer.report import print_costs
from nano_db.trainer.run import Run


class PeakBytes(TorchDispatchMode):
    """Within this context, `peak` is the most bytes that tensors made here have held at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if torch.is_tensor(leaf)):
            if storage not in known and storage not in self.seen:  # neither a view, nor in place
                self.seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


class Chain(nn.Module):
    """x -> W1 -> relu -> W2 -> mean: small enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False)

    def loss(self, x):
        return self.second(self.first(x).relu()).square().mean()


def test_the_four_parts_of_a_network_counted_by_hand():
    model = Chain()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    count = training_bytes(model, [torch.randn(8, 10)], optimizer)
    weights = 4 * (10 * 20 + 20 * 5)
    assert count["weights"] == count["gradients"] == weights
    assert count["optimizer"] == 2 * weights + 2 * 4  # two moments, and one step counter per tensor
    # saved: the input of each product (8 x 10, and relu's output 8 x 20, which relu keeps as well: once), the output
    # (8 x 5)
    assert count["activations"] == 4 * (8 * 10 + 8 * 20 + 8 * 5)
    assert count["total"] == sum(count[part] for part in ("weights", "gradients", "optimizer", "activations"))


class Deep(nn.Module):
    """Four equal layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(16, 2) for _ in range(4))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def loss(self, x):
        return self(x).square().mean()


def test_checkpointed_layers_keep_their_inputs_and_one_active_layer():
    x, counts = torch.randn(8, 32, 16, requires_grad=True), {}  # so that the first layer is as the others
    for on in (False, True):
        model = Deep()
        if on:
            checkpoint_layers(model)
        counts[on] = training_bytes(model, [x], torch.optim.SGD(model.parameters()))["activations"]
    end = 4 * x.numel()  # what the mean of squares keeps
    one_layer = (counts[False] - end) // 4  # with its input
    assert counts[True] == end + 4 * 4 * x.numel() + one_layer - 4 * x.numel()
    assert counts[True] < 0.5 * counts[False]


def test_checkpoints_lower_the_true_peak_and_change_no_gradient():
    x, peaks, gradients = torch.randn(8, 64, 16), [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = Deep()
        if on:
            checkpoint_layers(model)
        with PeakBytes() as tensors:
            model.loss(x).backward()
        peaks.append(tensors.peak)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert peaks[1] < 0.75 * peaks[0]
    assert all(map(torch.equal, *gradients))


def measured(model, x, y):
    """Of one backward pass: the loss, the true peak, the gradients, and the count of activations."""
    with PeakBytes() as tensors:
        loss = model.loss(x, y)
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    count = training_bytes(model, [x, y], torch.optim.SGD(model.parameters()))["activations"]
    return loss.detach(), tensors.peak, gradients, count


def test_cross_entropy_in_chunks_is_the_same_and_keeps_no_logits(monkeypatch):
    """A block and the end-to-end network, whole and two samples at a time: loss, gradients, and the true peak."""
    V, d = 3000, 16
    noise, target_embeddings = LogNormal(sigma_min=0.1, sigma_max=10.0), make_target_embeddings(V, d)
    x, y = torch.randint(V, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    for make in (
        lambda: DiffusionBlock(nn.Embedding(V, d), DenoisingHead(target_embeddings), noise, (0.1, 10.0)),
        lambda: EndToEnd(nn.Embedding(V, d), PosteriorHead(target_embeddings)),
    ):
        found = []
        for numbers in (2**24, 2 * 12 * V):
            monkeypatch.setattr(heads, "MOST_LOGITS", numbers)
            torch.manual_seed(0)
            model = make()
            found.append(measured(model, x, y))
        losses, peaks, gradients, counts = zip(*found, strict=True)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for whole, parts in zip(*gradients, strict=True):
            torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-7)
        assert peaks[1] < 0.4 * peaks[0] and counts[1] < 0.3 * counts[0]


def test_the_table_has_every_part_and_ratios_to_the_last_column(capsys):
    count, use = training_bytes(Chain(), [torch.randn(8, 10)], torch.optim.SGD(Chain().parameters())), {"seconds": 2.0}
    twice = {"memory_bytes": {part: 2 * value for part, value in count.items()}, "one_sample": {"seconds": 4.0}}
    print_costs({"a": {"memory_bytes": count, "one_sample": use}, "b": twice})
    training, in_use = capsys.readouterr().out.strip().split("\n\n")
    for table, rows in ((training, 6), (in_use, 2)):
        lines = table.splitlines()
        assert len(lines) == rows and "(0.500)" in lines[-1] and "(1.000)" in lines[-1]


IMAGES = ["--preset", "tiny", "--width", "16", "--steps", "4", "--warmup", "2", "--device", "cpu"]


@pytest.mark.parametrize(
    "script, flags, trainings",
    [
        (train_gpt, [*SMALL, "--blocks", "2", "--rounds", "2"], 4),
        (train_mdm, [*SMALL, "--only", "0,1"], 2),
        (train_vit, [*IMAGES, "--only", "0,1", "--glyphs", "150"], 2),
        (train_dit, [*IMAGES, "--only", "0,1"], 2),
    ],
    ids=["gpt", "mdm", "vit", "dit"],
)
def test_while_a_block_trains_nothing_of_another_is_in_memory(
    small, cli, text_file, tmp_path, monkeypatch, script, flags, trainings
):
    """Weights, gradients, optimizer's state: all tensors of a block that has trained are gone before the next begins,
    and without the help of Python's garbage collector.
    """
    monkeypatch.setitem(script.PRESETS, "tiny", {**script.PRESETS["tiny"], "ema": 0.9})
    trained, alive, build, steps, make = [], [], script.first_weights, Run.steps, script.make_optimizer
    load, loaded = Run.trained_block, []

    def checked_build(*args):
        assert not [reference() for reference in alive if reference() is not None]
        return build(*args)

    def noted_load(run, *args):  # for an evaluation between two rounds
        block = load(run, *args)
        loaded.extend(map(weakref.ref, block.parameters()))
        return block

    def noted_make(module, settings):
        assert not [reference() for reference in loaded if reference() is not None]
        optimizer = make(module, settings)
        alive.extend(map(weakref.ref, [module, optimizer, *module.parameters()]))
        return optimizer

    def noted_steps(run, b, module, optimizer):
        for step in steps(run, b, module, optimizer):
            yield step
            if step == 0:
                state = [v for moments in optimizer.state.values() for v in moments.values()]
                assert state
                alive.extend(map(weakref.ref, state))
        trained.append(b)

    monkeypatch.setattr(script, "first_weights", checked_build)
    monkeypatch.setattr(Run, "steps", noted_steps)
    monkeypatch.setattr(Run, "trained_block", noted_load)
    monkeypatch.setattr(script, "make_optimizer", noted_make)
    data = [] if flags[: len(IMAGES)] == IMAGES else ["--data", text_file]
    code, _, err = cli(*flags, *data, "--out", tmp_path / "run", main=script.main)  # `small` keeps the samples short
    assert code == 0, err
    assert len(trained) == trainings and len(alive) > 20 * trainings


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux caps the memory of a process")
def test_what_does_not_fit_end_to_end_is_trained_in_blocks(tmp_path):
    """113 million weights take 1.8 GB with gradients and AdamW's averages. The processes here are given 1.5 GB."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")

    size = "--preset tiny --layers 16 --width 768 --seq-len 64 --batch-size 4 --eval-windows 1 --device cpu"
    flags = [*size.split(), "--steps", "2", "--warmup", "1"]

    def run(*more):
        return subprocess.run(
            [sys.executable, "train_gpt.py", *flags, *more],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"},  # what is freed is free
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (1_500_000_000, 1_500_000_000)),
            capture_output=True,
            text=True,
        )

    whole = run("--baseline", "--out", tmp_path / "whole")
    assert whole.returncode == 2 and whole.stderr.count("\n") == 1
    assert (
        "out of memory: try --checkpoint-activations" in whole.stderr
        and not (tmp_path / "whole" / "block_0.pt").exists()
    )
    blocks = ("--blocks", "8", "--out", tmp_path / "blocks")
    assert run(*blocks, "--only", "5").returncode == 0
    kept = (tmp_path / "blocks" / "block_5.pt").read_bytes()
    done = run(*blocks)  # the other seven, evaluation, a sample, and the costs
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "blocks" / "block_5.pt").read_bytes() == kept and "bits per character" in done.stdout
    assert "end to end: a training step does not fit" in done.stdout
    result = json.loads((tmp_path / "blocks" / "result.json").read_text(encoding="utf-8"))
    assert result["memory_bytes"]["total"] < 0.5e9 and "baseline_memory_bytes" not in result
