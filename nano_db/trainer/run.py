"""One run of a script: which blocks are to be trained, and what surrounds their training loop.

A block that is not being trained lives in its file. To train one is: build it, load its file, take steps, save it, free
it. This one mechanism gives the memory saving (weights, gradients, optimizer state and activations of a single block),
exact resume, and workers on other machines.

Every step draws all its randomness from (seed, block, step). So neither the order in which blocks take turns, nor an
interruption, nor training a block elsewhere can change its weights: bit for bit on a CPU.
"""

import gc
import math
import platform
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from nano_db import __version__
from nano_db.errors import UsageError
from nano_db.layers import checkpoint_layers
from nano_db.partition import split_layers
from nano_db.trainer import checkpoints, initial
from nano_db.trainer.distributed import Group, Worker, is_one_of_several, join

# (seed, b, 0, 0, 1) seeds the first weights of block b, and (seed, b, step, rank, *stream) its steps.
FIRST_WEIGHTS = (0, 0, 1)
VERSIONS = dict(nano_db=__version__, python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


def seed_from(*numbers):
    """Seed torch's generators from whole numbers below 2^32. For up to four numbers, trailing zeros do not count."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def make_optimizer(module, settings):
    """AdamW, betas (0.9, 0.99), weight decay on matrices only."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate(step, settings):
    """Linear warm-up, then a cosine from the peak to final_rate times the peak, at `step` of settings.steps."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low = settings.final_rate
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(step, settings):
    """Decay of the moving average at `step`: low at first, so that an average over few steps forgets the random initial
    weights (as in TensorFlow's ExponentialMovingAverage), then settings.ema.
    """
    return min(settings.ema, (1 + step) / (10 + step))


def networks(settings):
    """How many networks a run trains, each with a file."""
    return getattr(settings, "ensemble" if settings.baseline else "blocks", 1)


def autocast(settings):
    """The context to compute in."""
    return torch.autocast(settings.device, torch.bfloat16, settings.dtype == "bfloat16")


def first_weights(build, b, settings, *shared):
    """build(b, settings, *shared) on the device: block b, with weights that depend only on the seed and b."""
    if settings.compile:
        gc.collect()  # a compiled network refers to itself: the previous block is still in memory
    seed_from(settings.seed, b, *FIRST_WEIGHTS)
    module = build(b, settings, *shared).to(settings.device)
    if settings.checkpoint_activations:
        checkpoint_layers(module)
    return module


def noise_identity(partition):
    """What identifies the noise levels of a Partition, as plain values for a Run's depends_on. The edges are not
    enough: those of a single block are just the ends of the range.
    """
    noise = partition.noise
    return {"edges": [round(edge, 5) for edge in partition.edges], "p_mean": noise.p_mean, "p_std": noise.p_std}


class Run:
    """script: its name, like "gpt". settings: those of trainer/settings.py. keeps: what sampling needs of the data, and
    what the run of --init-from must agree with, like the vocabulary. depends_on: what else the weights depend on, like
    the data's checksum. Both are plain values.

    count: networks to train, each with its own file. batch_size: samples that this process draws per step.
    """

    def __init__(self, script, settings, keeps=None, **depends_on):
        self.script, self.settings, self.depends_on, self.folder = script, settings, depends_on, Path(settings.out)
        self.autocast, self.count, self.keeps, self.split = autocast(settings), networks(settings), keeps or {}, []
        if hasattr(settings, "layers") and not settings.baseline:  # refuses before there is a folder
            self.split = split_layers(settings.layers, settings.blocks, getattr(settings, "layer_split", ""))
        fixed = {f.name: getattr(settings, f.name) for f in fields(settings) if not f.metadata["resumable"]}
        # What a block's file must agree with:
        self.fixed = {**fixed, "script": script, "version": __version__, **depends_on}
        if settings.init_from:
            depends_on["init_from_sha256"] = initial.initial_checksums(settings, self.count, self.keeps, self.fixed)
            self.fixed |= depends_on
        # A run that starts from another must not draw the same batches and noise again in the same order:
        self.stream = [int(self.fixed["init_from_sha256"][:8], 16)] if settings.init_from else []
        self.paths = [self.folder / f"block_{b}.pt" for b in range(self.count)]
        only, self.worker, self.group = getattr(settings, "only", ""), Worker(), Group()
        self.mine = chosen_blocks(only, self.count) if only else list(range(self.count))
        if is_one_of_several():
            self.worker = join()
            self.mine, self.group = self.worker.assign(self.mine, settings.batch_size)
        if settings.eval_only:
            self.mine = []
        self.alone = not only and self.worker.world_size == 1  # no other process trains blocks of this run
        self.batch_size = settings.batch_size // self.group.size
        # The end of this round; whether this process has trained; (loss, gradient norm) since the last log line:
        self.step_to_reach, self.trained, self.losses = 0, False, []
        self.finished = False  # whether all blocks had taken all steps when `ready` looked: a run reports then

    # --- the training loop, from outside to inside ---

    def rounds(self):
        """Yield the rounds: in each of R, every block trains steps / R steps. Scripts evaluate after each, if `ready`.
        With --only or torchrun there is only one. Raises UsageError if another process trains one of these blocks.
        """
        self._take_folder()
        settings = self.settings
        if not (self.worker.rank or settings.eval_only):
            where = f"{settings.device}, {settings.dtype}"
            if settings.device == "cpu" and torch.backends.mps.is_available():
                where += " (--device mps would use this Mac's GPU, which is untested)"
            print(f"preset {settings.preset} on {where}: {self.count} x {settings.steps} steps")
        rounds = settings.rounds if self.alone and not settings.eval_only else 1
        with ExitStack() as locks:
            for b in self.mine if self.group.rank == 0 else ():
                locks.enter_context(checkpoints.lock(self.folder / f".block_{b}.lock", f"block {b}"))
                for aside in self.folder.glob(f".block_{b}.pt.*"):  # what a killed owner left half-written
                    aside.unlink(missing_ok=True)
            for r in range(1, rounds + 1):
                self.step_to_reach = settings.steps * r // rounds
                yield r

    def blocks_to_train(self):
        """This process's blocks that have steps left in this round, one after the other."""
        return (b for b in self.mine if self.step_of(b) < self.step_to_reach)

    def steps(self, b, module, optimizer):
        """Yield block b's steps of this round, for a loop whose body takes a step and passes its loss to `record`.

        First the block's file is loaded. Before each step the generators are seeded and the learning rate is set; after
        it the moving average is updated and, at times, metrics and the file are written. Raises KeyboardInterrupt after
        saving, on Ctrl-C or SIGTERM; UsageError for a loss that is not finite, leaving the last good file in place.
        """
        settings, group = self.settings, self.group
        at = self._restore(b, module, optimizer)
        if settings.compile:
            module.network.compile()  # in place: the names of the weights stay as they are
        module.train()
        with group.connected(b, settings.device, at.step) if group.size > 1 else nullcontext(), stop_requests() as stop:
            at.clock = time.perf_counter()  # neither loading nor waiting for other processes is training
            while at.step < self.step_to_reach and not at.stopped:
                seed_from(settings.seed, b, at.step, group.rank, *self.stream)
                for parameters in optimizer.param_groups:
                    parameters["lr"] = learning_rate(at.step, settings)
                yield at.step
                self._after_step(b, module, optimizer, at, stop)
        if stop or at.stopped:
            raise KeyboardInterrupt("progress is saved: run the same command again to resume")

    def average_gradients(self, module):
        """If several processes train this block, replace each one's gradients by the mean of all."""
        if self.group.size > 1:
            self.group.average([p.grad for p in module.parameters() if p.grad is not None])

    def record(self, loss, norm):
        """Note the loss and the norm of the gradient of a step, as tensors: reading values would make a GPU wait."""
        self.losses.append(torch.stack([loss.detach(), norm]))

    @property
    def last_round(self):
        """Whether this round takes the blocks to their last step; --eval-only and --only have no other."""
        return self.step_to_reach == self.settings.steps

    def ready(self):
        """Whether this process should evaluate now. Process 0 waits until all others have trained their blocks."""
        self.worker.wait_for_all()
        if self.worker.rank:
            return False
        settings, steps = self.settings, [self.step_of(b) for b in range(self.count)]  # once: others may be training
        unfinished = [b for b, step in enumerate(steps) if step < settings.steps]
        to_train = f"still to train: blocks {', '.join(map(str, unfinished))} of {self.folder}"
        if settings.eval_only and 0 in steps:
            raise UsageError(f"{to_train}; an evaluation needs all of them")
        if unfinished and not self.alone:
            print(to_train)
            return False
        if self.trained or self.last_round:
            reached = " to ".join(map(str, sorted({min(steps), max(steps)})))
            ends = f" (of {settings.steps}: it is not finished)" if settings.eval_only and unfinished else ""
            print(f"after {reached} steps" + (" of each network" if self.count > 1 else "") + ends + ":")
            self.finished = not (unfinished or settings.eval_only)
            return True
        return False

    # --- files ---

    def trained_block(self, b, build, *shared):
        """Block b from its file, for evaluation: with the moving average of its weights, if there is one."""
        if not self.paths[b].exists():
            raise UsageError(f"{self.paths[b]} is missing: block {b} has not been trained yet")
        state, module = self.load_block(b), first_weights(build, b, self.settings, *shared)
        with self._fitting(b):
            module.load_state_dict(state["ema"] or state["weights"])
        return module.eval()

    def trained_blocks(self, build, *shared):
        return [self.trained_block(b, build, *shared) for b in range(self.count)]

    def step_of(self, b):
        """The step that block b's file has reached; 0 if there is no file."""
        return self.load_block(b)["step"] if self.paths[b].exists() else 0

    def save_block(self, b, step, seconds, weights, optimizer, ema=None):
        """seconds: pure training time so far. All are tensors and plain values, so weights_only=True can load them."""
        state = {"block": b, "step": step, "seconds": seconds, "settings": self.fixed}
        state |= {"weights": weights, "optimizer": optimizer, "ema": ema}
        checkpoints.write_atomically(self.paths[b], lambda file: torch.save(state, file))

    def load_block(self, b):
        """The dictionary that save_block wrote, on the CPU."""
        state = checkpoints.read_block(self.paths[b])
        if different := checkpoints.differences(state["settings"], self.fixed):
            raise UsageError(f"{self.paths[b]} does not belong to this run: {'; '.join(different)}")
        if state["block"] != b:
            raise UsageError(f"{self.paths[b]} holds block {state['block']}: it has been renamed, or copied")
        return state

    def log(self, kind, **record):
        """Append a record to the metrics: to its block's, if it names one, which only that block's process writes."""
        name = f"metrics_{record['block']}.jsonl" if "block" in record else "metrics.jsonl"
        checkpoints.append_json(self.folder / name, {"kind": kind, **record})

    def log_evaluation(self, metrics):
        """Append the metrics of an evaluation, except with --eval-only, which leaves the run as it is."""
        if not self.settings.eval_only:
            self.log("evaluation", step=self.step_to_reach, **metrics)

    def _take_folder(self):
        """Claim the folder for this run, or raise UsageError: a folder belongs to one set of settings."""
        config = self.folder / "config.json"
        checkpoints.make_folder(self.folder)
        if not config.exists() or self._may_replace():
            with checkpoints.lock(self.folder / ".config.lock", "config.json", wait=True):
                if not config.exists() or self._may_replace():  # several processes may have started at once
                    if any(self.folder.glob("block_*.pt")):
                        raise UsageError(f"{self.folder} holds block files but no config.json: choose another --out")
                    about = {"script": self.script, "depends_on": self.depends_on, "settings": asdict(self.settings)}
                    return checkpoints.write_json(config, {**about, "versions": VERSIONS, "keeps": self.keeps})
        there = checkpoints.identity(checkpoints.read_config(self.folder))
        if checkpoints.differences(there, self.fixed):
            self._refuse_folder_of(there)

    def _may_replace(self):
        """Whether the folder's run has other settings, has trained nothing, and no process is about to. So a run with
        a typo that was refused later does not block the folder.
        """
        if self.settings.eval_only or [*self.folder.glob("block_*.pt"), *self.folder.glob("metrics_*.jsonl")]:
            return False
        if not checkpoints.differences(checkpoints.identity(checkpoints.read_config(self.folder)), self.fixed):
            return False
        try:
            for path in self.folder.glob(".block_*.lock"):
                with checkpoints.lock(path, path.name):
                    pass
        except UsageError:  # it is held
            return False
        return True

    def _refuse_folder_of(self, there):
        """Raise UsageError: the folder holds a run with other settings, `there`. Says which, and what to do."""
        settings, different = self.settings, checkpoints.differences(there, self.fixed)
        for path, checksum in checkpoints.PATHS.items():  # another path says enough
            if told := [text for text in different if text.startswith(checksum)]:
                different.remove(told[0])
                if not any(text.startswith(f"{path} ") for text in different):
                    different.append(f"the {path} has changed")
        different = [text for text in different if not text.startswith("edges ")] or different  # others move them
        if preset := checkpoints.differences(there, {"preset": settings.preset}):  # by itself no reason to refuse
            different = preset
        holds = f"{self.folder} holds a run with other settings ({'; '.join(different)})"
        if settings.eval_only:
            raise UsageError(f"{holds}: drop these flags, because an evaluation uses the run's own")
        ways = ["choose another --out"]
        shapes = initial.needed(settings, self.fixed, cut=False)
        if there.get("steps", 0) < settings.steps and not checkpoints.differences(there, shapes):
            ways[0] += f" (to train that run further, add --init-from {self.folder})"
        if preset:
            ways.append(f"resume that run with its own preset (--preset {there.get('preset')})")
        elif there.get("data_sha256") != self.fixed["data_sha256"]:
            ways.append(f"resume that run with its own data (--data {there.get('data')})")
        raise UsageError(f"{holds}: {', '.join(ways)}, or delete that folder")

    def _restore(self, b, module, optimizer):
        """Load block b's file, if there is one, into module and optimizer. Returns where its training stands."""
        self.losses = []
        at = SimpleNamespace(step=0, seconds=0.0, average=None, stopped=False)
        if self.paths[b].exists():
            state = self.load_block(b)
            at.step, at.seconds = state["step"], state["seconds"]
            with self._fitting(b):
                if self.settings.ema:
                    at.average = state["ema"] or {}
                    module.load_state_dict(at.average)  # to see that it fits; the weights come next
                module.load_state_dict(state["weights"])
                _load_moments(optimizer, state["optimizer"])
        elif self.fixed.get("init_from"):
            self._init_from_network(b, module)
        if self.settings.ema:
            source = at.average or module.state_dict()
            at.average = {name: tensor.clone().to(self.settings.device) for name, tensor in source.items()}
        return at

    def _after_step(self, b, module, optimizer, at, stop):
        """Update the average; now and then log and print metrics, and save the file. at: see _restore."""
        if at.average:
            weights = module.state_dict()
            averages, decay = [at.average[name] for name in weights], ema_decay(at.step, self.settings)
            torch._foreach_lerp_(averages, list(weights.values()), 1 - decay)  # one kernel
        at.step, self.trained = at.step + 1, True
        log_every = max(1, min(50, self.settings.steps // 10))
        save = at.step == self.step_to_reach or at.step % (5 * log_every) == 0
        # A group checks for stop requests only at fixed steps: all its members must stop at the same one.
        if not (save or at.step % log_every == 0 or (stop and self.group.size == 1)):
            return
        count = len(self.losses)
        loss = self._mean_loss(b, at.step)  # also waits for the device, so that the clock is right
        at.stopped, spent = self.group.any(stop, self.settings.device), time.perf_counter() - at.clock
        at.seconds += max(0.0, spent)  # clocks have been seen to run backwards
        if self.group.rank == 0:
            rate, pace = optimizer.param_groups[0]["lr"], max(1e-9, spent) / count
            self.log("train", block=b, step=at.step, loss=loss, learning_rate=rate, seconds=at.seconds)
            if save or at.stopped:  # before printing: the terminal may be gone
                self.save_block(b, at.step, at.seconds, module.state_dict(), optimizer.state_dict(), at.average)
            left = f"{1 / pace:.1f} steps/s  {pace * (self.step_to_reach - at.step):.0f} s left"
            print(f"{self._label(b)}  step {at.step}/{self.step_to_reach}  loss {loss:.4f}  {left}", flush=True)
        at.clock = time.perf_counter()

    def _init_from_network(self, b, module):
        """Give block b, which has no file yet, the weights to start from: another block's, or layers of a network."""
        settings, checksums = self.settings, self.fixed["init_from_sha256"].split()
        source = b if len(checksums) > 1 else 0
        weights, sha256, state = initial.initial_weights(settings, source)
        if sha256 != checksums[source]:
            raise UsageError(f"--init-from {settings.init_from}: its weights are not those with which this run began")
        if state["settings"]["baseline"] and not settings.baseline:
            weights = initial.layers_of(weights, module.state_dict(), sum(self.split[:b]))
        with checkpoints.explained(f"--init-from {settings.init_from}: block {source} does not fit this network"):
            module.load_state_dict(weights)

    def _fitting(self, b):
        """A context for loading block b's file: errors of many kinds can mean that it does not fit."""
        fault = f"{self.paths[b]} does not fit the network of these settings: it is not part of this run"
        return checkpoints.explained(fault)

    def _label(self, b):
        name = "baseline" if self.settings.baseline else "block"
        return f"{name} {b}" if self.count > 1 or name == "block" else name

    def _mean_loss(self, b, step):
        """Mean of the losses since the last log line, over the whole batch. Raises UsageError unless all are finite."""
        values, self.losses = self.group.mean(torch.stack(self.losses)).tolist(), []
        for taken, (loss, norm) in enumerate(values, start=step - len(values) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):  # an infinite gradient would ruin the weights, too
                path = self.paths[b]
                kept = f"{path} keeps the last good state" if path.exists() else "no file was written yet"
                at = f"the loss is {loss} and the gradient's norm {norm} at step {taken}"
                raise UsageError(f"{self._label(b)}: {at}; {kept}. Try a smaller --learning-rate")
        return sum(loss for loss, _ in values) / len(values)


class OneAtATime(Sequence):
    """The trained blocks of a run as a list that holds one of them in memory at a time: the last one requested."""

    def __init__(self, run, build, *shared):
        self.run, self.builder, self.held, self.block = run, (build, *shared), None, None

    def __len__(self):
        return self.run.count

    def __getitem__(self, b):
        if not 0 <= b < len(self):
            raise IndexError(b)
        if b != self.held:
            self.held, self.block = None, None  # first free the previous one
            torch.clear_autocast_cache()  # it keeps bfloat16 weights even of modules that are gone
            self.held, self.block = b, self.run.trained_block(b, *self.builder)
        return self.block


@contextmanager
def stop_requests():
    """Ctrl-C or SIGTERM fills the list that this yields, so no step is cut in half. A second Ctrl-C stops at once."""
    stop, main = [], threading.current_thread() is threading.main_thread()  # elsewhere: no handlers

    def request(number, frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def chosen_blocks(only, count):
    """The blocks that --only names, like "2" or "0,3"."""
    numbers = {str(b): b for b in range(count)}
    chosen = [numbers.get(part.strip()) for part in only.split(",")]
    if None in chosen:
        raise UsageError(f"--only {only!r} must be block numbers from 0 to {count - 1}, like 2 or 0,3")
    return list(dict.fromkeys(chosen))


def _load_moments(optimizer, state):
    """Load only AdamW's averages from a state_dict: the rest comes from the settings.

    Raises whatever error comes first if the averages do not fit.
    """
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["state"]})
    for p, moments in optimizer.state.items():
        checkpoints.require(set(moments) == {"step", "exp_avg", "exp_avg_sq"} and moments["step"].shape == ())
        checkpoints.require(moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape)
