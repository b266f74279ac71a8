"""One training loop for everything that has `.loss(batch)`: a diffusion block, or the end-to-end baseline.

A block that is not being trained lives in its file. To train one is: build it, load its file, take steps, save it, free
it. This one mechanism gives the memory saving (weights, gradients, optimizer state and activations of a single block),
exact resume, and workers on other machines.

Every step draws all its randomness from (seed, block, step). So neither the order in which blocks take turns, nor an
interruption, nor training a block alone elsewhere can change its weights: bit for bit on a CPU.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch

from nano_db.device import autocast
from nano_db.errors import UsageError
from nano_db.layers import checkpoint_layers
from nano_db.memory import peak_resident_bytes
from nano_db.optimizer import learning_rate, load_moments, make_optimizer
from nano_db.progress import ProgressBar, stop_requests
from nano_db.workers import Worker


def seed_from(*numbers):
    """Seed torch's generators from a tuple of whole numbers below 2^32: different tuples give unrelated streams.

    Zeros at the end do not count, so a block's first weights and its step 0 share a stream, which does no harm.
    """
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


class Trainer:
    """Trains the blocks of a run.

    run: its folder (run.py), or None where nothing is kept. make(b): builds block b, on the CPU. batch(): draws a
    training batch, on the device, from torch's global generator. settings: has the fields of settings.RunSettings.
    worker: which of several processes this is (workers.py).
    """

    def __init__(self, run, make, batch, settings, device, worker=None):
        self.run, self.make, self.batch, self.settings, self.device = run, make, batch, settings, device
        self.networks = settings.ensemble if settings.baseline else settings.blocks  # to train, each with a file
        self.worker = worker or Worker()
        self.chosen, self.team = self.worker.share(chosen_blocks(settings.only, self.networks))
        self.peak_resident = None  # bytes this process held at most, up to the first evaluation

    def train_all(self, evaluate):
        """Let the blocks take turns: in R rounds, each trains steps / R steps a round. After a round, evaluate(step).

        With --only, or as one of several processes, there is one round of all steps, as the other blocks stand
        elsewhere; process 0 evaluates when all of them are complete, too. Returns whether they are (process 0), and
        False for other processes. Raises UsageError if another process is training one of the blocks.
        """
        settings, worker = self.settings, self.worker
        mine = [] if settings.eval_only else self.chosen
        apart = settings.only or worker.ranks > 1
        rounds = 1 if apart else settings.rounds
        with ExitStack() as locks:
            for b in mine if self.team.leads else []:
                locks.enter_context(self.run.lock_block(b))
            for r in range(1, rounds + 1):
                trained = [self.train(b, settings.steps * r // rounds) for b in mine]
                if any(trained) and self.peak_resident is None:
                    self.peak_resident = peak_resident_bytes()
                worker.finish()
                if worker.rank or (apart and self.unfinished()):
                    return False
                if any(trained) or r == rounds:
                    evaluate(min(self._steps()))
        return not self.unfinished()

    def unfinished(self):
        """Numbers of the blocks that still have steps to go."""
        return [b for b, step in enumerate(self._steps()) if step < self.settings.steps]

    def _steps(self):
        """The step at which each block's file stands."""
        states = (self.run.load_block(b, whole=False) for b in range(self.networks))
        return [state["step"] if state else 0 for state in states]

    def build(self, b):
        """Block b with its first weights, which depend on the seed and b alone."""
        seed_from(self.settings.seed, b)
        module = self.make(b).to(self.device)
        checkpoint_layers(module, self.settings.checkpoint_activations)
        return module

    def restore(self, b):
        """Block b as its file has it, for evaluation: with the moving average of its weights, where there is one."""
        state = self.run.load_block(b)
        if state is None:
            raise UsageError(f"{self.run.block_path(b)} is missing: block {b} has not been trained yet")
        module = self.build(b)
        self._fill(module.load_state_dict, state["ema"] or state["weights"], b)
        return module.eval()

    def train(self, b, until):
        """Take block b from where its file stands to step `until`. Returns whether there was anything to do.

        Raises KeyboardInterrupt after saving, at the first step boundary after Ctrl-C or SIGTERM; UsageError for a loss
        that is not finite, with the last good file in place.
        """
        with self.team.connected(b, self.device):
            return self._train(b, until)

    def _train(self, b, until):
        settings, team, state = self.settings, self.team, self.run.load_block(b)
        step, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
        if not team.agrees(step, self.device):
            raise UsageError(
                f"{self.run.block_path(b)} is not the same to all processes that share block {b}: "
                "give them an --out on a disk that all of them see"
            )
        if step >= until:
            return False
        module = self.build(b).train()
        optimizer = make_optimizer(module, settings)
        ema = None
        if settings.ema:
            if state:
                self._fill(module.load_state_dict, state["ema"] or {}, b)  # to see that it fits; the weights come next
            start = state["ema"] if state else module.state_dict()
            ema = {name: tensor.clone().to(self.device) for name, tensor in start.items()}
        if state:
            self._fill(module.load_state_dict, state["weights"], b)
            self._fill(partial(load_moments, optimizer), state["optimizer"], b)
        if settings.compile:
            module.network.compile()  # in place: the names of the weights stay as they are
        loss_of = team.loss(module, settings.batch_size)

        losses, stopped, clock = [], False, time.perf_counter()
        with stop_requests() as stop, ProgressBar(self._label(b), step, until, self.worker.ranks == 1) as bar:
            while step < until and not stopped:
                losses.append(self.step(module, optimizer, b, step, loss_of))
                step += 1
                if ema:
                    for name, tensor in module.state_dict().items():
                        ema[name].lerp_(tensor, 1 - settings.ema)

                save = step == until or step % settings.save_every == 0
                # A team looks at requests to stop at fixed steps only: all its members must stop at the same one.
                if save or step % settings.log_every == 0 or (stop and team.size == 1):
                    loss = self._mean_loss(losses, b, step)  # also waits for the device, so that the clock is right
                    stopped = team.any(stop, self.device)
                    seconds += max(0.0, time.perf_counter() - clock)  # clocks have been seen to run backwards
                    if team.leads:
                        rate = optimizer.param_groups[0]["lr"]
                        record = {"block": b, "step": step, "loss": loss, "learning_rate": rate, "seconds": seconds}
                        self.run.log(kind="train", **record)
                        bar.update(step, loss)
                        if save or stopped:
                            self.run.save_block(b, step, seconds, module.state_dict(), optimizer.state_dict(), ema)
                    losses, clock = [], time.perf_counter()
        if stop or stopped:
            raise KeyboardInterrupt
        return True

    def step(self, module, optimizer, b, step, loss_of=None):
        """One step of AdamW on loss_of(batch), by default module.loss. Returns the loss and the gradient's norm, as a
        tensor: looking at it would make a GPU wait.
        """
        seed_from(self.settings.seed, b, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings)
        with autocast(self.settings, self.device):
            loss = (loss_of or module.loss)(self.batch())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    def _mean_loss(self, losses, b, step):
        """Mean of the losses since the last look, over the whole batch, if all of them were sound."""
        values = self.team.mean(torch.stack(losses)).tolist()
        for i, (loss, norm) in enumerate(values):
            if not (math.isfinite(loss) and math.isfinite(norm)):  # an infinite gradient would spoil the weights, too
                path = self.run.block_path(b)
                kept = f"{path} keeps the last good state" if path.exists() else "no file was written yet"
                at = f"the loss is {loss} and the gradient's norm {norm} at step {step - len(values) + i + 1}"
                raise UsageError(f"{self._label(b)}: {at}; {kept}. Try a smaller --learning-rate")
        return sum(loss for loss, _ in values) / len(values)

    def _label(self, b):
        return f"baseline {b}" if self.settings.baseline else f"block {b}"

    def _fill(self, load, state, b):
        """Let load(state) take up a part of block b's file."""
        try:
            load(state)
        except Exception as error:  # which one depends on what does not fit
            path = self.run.block_path(b)
            raise UsageError(f"{path} does not fit the network of these settings: it is no part of this run") from error


class InTurn(Sequence):
    """The trained blocks of a run as a list that holds one of them in memory at a time: the last that was asked for.

    For walks that go through the blocks once. trainer: the run's.
    """

    def __init__(self, trainer):
        self.trainer, self.held, self.block = trainer, None, None

    def __len__(self):
        return self.trainer.networks

    def __getitem__(self, b):
        if not 0 <= b < len(self):
            raise IndexError(b)
        if b != self.held:
            self.held, self.block = None, None  # free the one before first
            self.held, self.block = b, self.trainer.restore(b)
        return self.block


def chosen_blocks(only, count):
    """The blocks that --only names ("2" or "0,3"), or all of them."""
    if not only:
        return list(range(count))
    try:
        chosen = [int(part) for part in only.split(",")]
    except ValueError:
        raise UsageError(f"--only {only!r} is not a list of block numbers like 0,3") from None
    wrong = [b for b in chosen if not 0 <= b < count]
    if wrong:
        raise UsageError(f"--only {only}: there is no block {wrong[0]}; blocks are numbered 0 to {count - 1}")
    return chosen
