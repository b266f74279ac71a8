"""For test_workers.py: run a script, and write into the file $RECORD.<rank> what its process sent to others, and how,
and a checksum of the weights and the optimizer's state in which it leaves each block. $EMA is the decay of averages.

All that a process can send goes through a process group or through the store in which groups are arranged.
"""

import hashlib
import json
import os
import runpy
import sys

import torch.distributed as dist

sys.path.insert(0, os.getcwd())
from nano_db.trainer.run import Run
from nano_db.trainer.settings import Discrete

record = {"groups": [], "store": [], "weights": {}}
init_process_group, rendezvous, steps = dist.init_process_group, dist.rendezvous, Run.steps


def recorded_init(*args, **kwargs):
    init_process_group(*args, **kwargs)
    mine, all_ranks = int(os.environ["RANK"]), [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, mine)
    record["groups"].append(sorted(all_ranks))


def forbidden(*args, **kwargs):
    raise AssertionError("a second process group")


class RecordedStore:
    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        record["store"].append(name)
        return getattr(self.store, name)


def recorded_rendezvous(*args, **kwargs):
    for store, rank, ranks in rendezvous(*args, **kwargs):
        yield RecordedStore(store), rank, ranks


class PrefixStore(dist.PrefixStore):
    def __init__(self, prefix, recorded):  # a real store, which is what a process group needs
        super().__init__(prefix, recorded.store)


def recorded_steps(run, b, module, optimizer):
    yield from steps(run, b, module, optimizer)
    moments = [v for state in optimizer.state.values() for v in state.values()]
    sha256 = hashlib.sha256()
    for tensor in (*module.state_dict().values(), *moments):
        sha256.update(tensor.numpy().tobytes())
    record["weights"][b] = sha256.hexdigest()


Discrete.__dataclass_fields__["ema"].default = float(os.environ["EMA"])
dist.init_process_group, dist.new_group, dist.rendezvous = recorded_init, forbidden, recorded_rendezvous
dist.PrefixStore, Run.steps = PrefixStore, recorded_steps
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open(f"{os.environ['RECORD']}.{os.environ['RANK']}", "w") as file:
        json.dump(record, file)
