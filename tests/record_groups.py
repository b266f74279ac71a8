"""For test_workers.py: run a script, and write into the file $RECORD.<rank> what its process sent to others, and how.

All that a process can send goes through a process group or through the store in which groups are arranged.
"""

import json
import os
import runpy
import sys

import torch.distributed as dist

record = {"groups": [], "store": []}
init_process_group, rendezvous = dist.init_process_group, dist.rendezvous


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


dist.init_process_group, dist.new_group, dist.rendezvous = recorded_init, forbidden, recorded_rendezvous
dist.PrefixStore = PrefixStore
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open(f"{os.environ['RECORD']}.{os.environ['RANK']}", "w") as file:
        json.dump(record, file)
