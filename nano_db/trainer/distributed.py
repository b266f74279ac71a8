"""Many processes, one run: which process trains which block, and which of them share one.

torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts R processes. With as many
blocks, process r trains block r. With more blocks, a process trains several, one after the other. With more processes,
those of one block form a group, which is ordinary data-parallel training: each draws its own local batch, from (seed,
block, step, rank), and the gradients are averaged. What a group sends stays in the group, because the only process
group that a process ever joins is its block's; a process with a block to itself joins none. Nothing passes between
blocks except a count of the processes that have finished training, so that process 0 knows when to evaluate. Files do
the rest (run.py).
"""

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nano_db.errors import UsageError


@dataclass(frozen=True)
class Group:
    """The processes that train one block, as seen by process `rank` of `size`. Usually there is only one.

    store: where the members find each other (a torch.distributed.Store).
    """

    rank: int = 0
    size: int = 1
    store: Any = None

    @contextmanager
    def connected(self, b, device, step):
        """A context in which the group of block b can communicate. All members must be at the same `step`."""
        if device == "mps":
            raise UsageError("--device mps cannot share a block between processes: start one process per block")
        if device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UsageError(f"{self.size} processes share block {b}, and need a GPU each: start fewer processes")
        backend, store = "nccl" if device == "cuda" else "gloo", dist.PrefixStore(f"block {b}", self.store)
        own = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, device_id=own)
        try:
            ends = torch.tensor([step, -step], device=device)
            self._all_reduce(ends, dist.ReduceOp.MAX)
            if ends[0] != -ends[1]:
                raise UsageError(
                    f"block {b}'s file is not the same for all processes that share the block: "
                    "give them an --out on a disk that all of them can see"
                )
            yield
        finally:
            dist.destroy_process_group()

    def average(self, tensors):
        """Replace each tensor by its mean over the members, in one message."""
        flat = self.mean(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def mean(self, values):
        """Mean over the members of a tensor that each of them has."""
        if self.size > 1:
            self._all_reduce(values)
            values /= self.size
        return values

    def any(self, flag, device):
        """Whether the flag is set for any member."""
        return bool(self.mean(torch.tensor(float(bool(flag)), device=device)))

    @staticmethod
    def _all_reduce(tensor, operation=dist.ReduceOp.SUM):
        try:
            dist.all_reduce(tensor, operation)
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "peer" in str(error):  # the latter is what gloo says
                message = "this block lost a process of its group: run the same command again to resume"
                raise UsageError(message) from error
            raise


@dataclass(frozen=True)
class Worker:
    """One process of a job: number `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    store: Any = None

    def assign(self, blocks, batch_size):
        """Which of `blocks` this process trains, and with whom: (list of blocks, Group).

        Neighbouring ranks form a group, since they are most likely on the same machine.
        """
        if self.world_size <= len(blocks):
            return blocks[self.rank :: self.world_size], Group()
        of_rank = [rank * len(blocks) // self.world_size for rank in range(self.world_size)]  # index into blocks
        mine = of_rank[self.rank]
        group = Group(self.rank - of_rank.index(mine), of_rank.count(mine), self.store)
        if batch_size % group.size:
            raise UsageError(f"--batch-size {batch_size} must be a multiple of the {group.size} processes of a block")
        return [blocks[mine]], group

    def wait_for_all(self):
        """Say that this process has trained its blocks. Process 0 waits here until all have, however long it takes."""
        if self.world_size > 1:
            self.store.add("finished", 1)
            while self.rank == 0 and self.store.add("finished", 0) < self.world_size:
                time.sleep(0.5)  # in Python, so that a signal can stop it


def is_one_of_several():
    """Whether a launcher such as torchrun has started this process with others."""
    return launcher_number("WORLD_SIZE", 1) > 1


def is_first():
    """Whether this process is the one that speaks for all."""
    return launcher_number("RANK", 0) == 0


def launcher_number(name, default):
    """A whole number that torchrun sets in the environment."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UsageError(f"{name}={text} in the environment is not a number: start with torchrun, or unset it")
    return int(text)


def join():
    """This process as a Worker, from what torchrun sets. On CUDA each process has its own GPU, if there are enough."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        advice = "set USE_LIBUV=0 before torchrun" if "libuv" in reason else "start with torchrun, or unset WORLD_SIZE"
        raise UsageError(f"WORLD_SIZE is set, but {reason}: {advice}") from error
    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank))
        torch.cuda.set_device(int(local) % torch.cuda.device_count())
    return Worker(rank, world_size, store)
