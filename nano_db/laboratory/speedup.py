"""How much sooner W processes are done than one: `python -m nano_db.laboratory.speedup --workers 2 train_gpt.py FLAGS`

One process trains all blocks, then torchrun starts W processes for the same blocks, each with one thread. The order
alternates: machines drift, so what counts is the ratio within each pair. Two ratios are printed: of the whole commands,
and of the training alone (of torchrun's, the process that trained longest). For W times as fast, W cores must be idle.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

from nano_db.errors import UsageError
from nano_db.machinery.files import read_folder
from nano_db.machinery.run import command
from nano_db.machinery.settings import Parser


def measure(workers, script, flags):
    """(seconds of the whole command, seconds of training) of `workers` processes, one thread each, in a new folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        line, threads = [sys.executable, *torchrun, script, *flags, "--out", folder], {"OMP_NUM_THREADS": "1"}
        clock = time.perf_counter()
        done = subprocess.run(line, env=os.environ | threads, capture_output=True, text=True)
        whole = time.perf_counter() - clock
        if done.returncode:
            raise UsageError(f"{script} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
        states = read_folder(folder)[1]
    seconds = [states[b]["seconds"] for b in sorted(states)]
    return whole, max(sum(seconds[rank::workers]) for rank in range(workers))


def main():
    parser = Parser(prog="python -m nano_db.laboratory.speedup", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("script", help="like train_gpt.py")
    args, flags = parser.parse_known_args()
    if args.workers < 2 or args.pairs < 2:
        raise UsageError("--workers and --pairs must be at least 2")
    ratios = []
    for pair in range(args.pairs):
        order = (1, args.workers) if pair % 2 else (args.workers, 1)
        seconds = {workers: measure(workers, args.script, flags) for workers in order}
        ratios.append([one / many for one, many in zip(seconds[1], seconds[args.workers], strict=True)])
    for name, values in zip(("whole command", "training"), zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name}: {args.workers} workers are {middle:.2f} times as fast as one (quartiles {low:.2f}, {high:.2f})")


if __name__ == "__main__":
    command(main)
