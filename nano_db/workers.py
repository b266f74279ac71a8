"""Many processes, one run: who trains which block, and who trains one block together.

torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts R processes. With as many
blocks, process r trains block r. With more blocks, a process takes several, one after the other. With more processes,
those of one block form a team: each computes its rows of every batch, and DistributedDataParallel averages their
gradients. What a team sends stays in the team, because the only process group that a process ever joins is its
team's; a process that trains alone joins none. Between blocks nothing passes but, at the end of the training, a count
of who has finished, so that process 0 knows when to evaluate. Files do the rest (run.py).

A team takes the same steps as one process would, up to rounding. Every member draws the whole batch and all its noise,
from (seed, block, step) as ever, and then computes its own rows: that is what `rows` in a loss means. Dropout alone
differs: a member draws masks for its own rows, and so the first row of each member's share gets the same mask.
"""

import inspect
import os
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from nano_db.errors import UsageError


@dataclass(frozen=True)
class Team:
    """The processes that train one block, seen from one of them: number `place` of `size`. Most often it is alone.

    store: where the members find each other (a torch.distributed.Store).
    """

    place: int = 0
    size: int = 1
    store: Any = None

    @property
    def leads(self):
        """Whether this member writes the block's files and speaks for the team."""
        return self.place == 0

    @contextmanager
    def connected(self, b, device):
        """A context in which the members of block b's team can talk to each other."""
        if self.size == 1:
            yield
            return
        if device == "mps":
            raise UsageError("--device mps cannot share a block between processes: start one process a block")
        if device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UsageError(f"{self.size} processes share block {b}, and need a GPU each: start fewer processes")
        backend, store = "nccl" if device == "cuda" else "gloo", dist.PrefixStore(f"block {b}", self.store)
        dist.init_process_group(backend, store=store, rank=self.place, world_size=self.size)
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "peer" in str(error):  # the latter is what gloo says
                raise UsageError(
                    f"block {b} lost a process of its team: the same command goes on from the last save"
                ) from error
            raise
        dist.destroy_process_group()

    def loss(self, module, batch_size):
        """The function batch -> loss whose gradients, after backward(), are those of the whole batch, in every member.

        DistributedDataParallel takes the mean of the members' gradients. A member's loss is a mean over its rows only,
        so it is scaled to weigh by their number.
        """
        if self.size == 1:
            return module.loss
        if "rows" not in inspect.signature(module.loss).parameters:
            raise UsageError("this network cannot share a batch (its loss takes no rows): start one process a block")
        if batch_size < self.size:
            raise UsageError(f"--batch-size {batch_size} is too small for the {self.size} processes of a block")
        start, stop = (batch_size * place // self.size for place in (self.place, self.place + 1))
        with warnings.catch_warnings():  # torch 2.13 has a new name for broadcast_buffers, which 2.6 has not
            warnings.simplefilter("ignore", FutureWarning)
            shared = nn.parallel.DistributedDataParallel(_Loss(module), broadcast_buffers=False)
        scale = (stop - start) * self.size / batch_size
        return lambda batch: scale * shared(batch, slice(start, stop))

    def mean(self, values):
        """Mean over the members of a tensor that each of them has."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag, device):
        """Whether the flag is set for any member."""
        return bool(self.mean(torch.tensor(float(bool(flag)), device=device)))

    def agrees(self, number, device):
        """Whether all members have the same number."""
        if self.size == 1:
            return True
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return bool(ends[0] == -ends[1])


class _Loss(nn.Module):
    """A block as DistributedDataParallel wants it: calling it gives the loss."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch, rows):
        return self.module.loss(batch, rows)


@dataclass(frozen=True)
class Worker:
    """One process of a job: number `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1
    store: Any = None

    def share(self, blocks):
        """Which of `blocks` this process trains, and its team: (list of blocks, Team).

        Neighbouring ranks form a team, as they stand on one machine, most likely.
        """
        if self.ranks <= len(blocks):
            return blocks[self.rank :: self.ranks], Team()
        of_rank = [rank * len(blocks) // self.ranks for rank in range(self.ranks)]  # index into blocks
        mine = of_rank[self.rank]
        return [blocks[mine]], Team(self.rank - of_rank.index(mine), of_rank.count(mine), self.store)

    def finish(self):
        """Say that this process has trained its share. Process 0 waits here until all have, however long it takes."""
        if self.ranks > 1:
            self.store.add("finished", 1)
            while self.rank == 0 and self.store.add("finished", 0) < self.ranks:
                time.sleep(0.5)  # in Python, so that a signal is heeded


def join():
    """This process as a Worker, from the environment that torchrun sets; without one, alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Worker()
    try:
        store, rank, ranks = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise UsageError(f"WORLD_SIZE is set, but {error}: start with torchrun, or unset WORLD_SIZE") from error
    return Worker(rank, ranks, store)
