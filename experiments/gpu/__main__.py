"""What does a GPU do with this project? The whole answer by one command, in nine minutes:

    python -m experiments.gpu --minutes 9 --out out/gpu

Four stages, in order of worth: does it work, what does a step cost, what does it hold, and the main job: training by
blocks and end to end. Each has a time limit and a process of its own, and what it finds is at once in report.md and
report.json, so that neither a fault nor the end of the time can lose it. Nothing is downloaded. With --minutes 60 the
main job is that of all five scripts, with --minutes 600 also the paper's vision transformer on CIFAR-100.
"""

import argparse
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import torch

from experiments.gpu import job, memory, report, speed, works
from experiments.gpu.cases import Options, one_line
from nano_db import __version__
from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import explained
from nano_db.trainer.run import command
from nano_db.trainer.settings import Parser

STAGES = {  # name: question, what answers it, and the share of all the time that it may take
    "works": ("Does it work?", works.run, 0.25),
    "speed": ("What does a step cost?", speed.run, 0.3),
    "memory": ("What does it hold?", memory.run, 0.15),
    "job": ("The main job", job.run, 1.0),  # all that is left
}
RESERVE = 5  # seconds: a stage with less is not begun
# A forked process need not import again; but CUDA must not have been touched before, so this process never does.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def found_by(work, options):
    """Yield the records that work(options) yields in a process of its own, for options.seconds at most: an error of
    CUDA spoils a process, and what hangs can only be killed. Raises TimeoutError, or RuntimeError if the process dies.
    """
    end, (ours, theirs) = time.monotonic() + options.seconds, PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work_apart, args=(work, options, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError
            try:
                record = ours.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"its process died ({process.exitcode}): see log.txt") from None
            if record is None:
                return
            yield record
    finally:
        process.kill()
        process.join()


def work_apart(work, options, connection):
    """In a process of its own: send what work(options) yields, then None. What is printed goes into log.txt."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    if options.preset == "tiny":
        torch.set_num_threads(1)  # its tensors are small: more threads only wait for each other
    with (
        open(options.out / "log.txt", "a", buffering=1, encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        for stream in (1, 2):  # of compilers, too
            os.dup2(log.fileno(), stream)
        try:
            for record in work(options):
                connection.send(record)
        except Exception as error:
            traceback.print_exc()
            connection.send({"passed": False, "said": one_line(error)})
    connection.send(None)


def end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def describe(options):
    """Yield ("device", in words) and what else a reader of the report has to know; nothing where there is no GPU."""
    if options.device == "cuda":
        if not torch.cuda.is_available():
            return
        text = torch.cuda.get_device_name()
        with suppress(Exception):  # of a device that is not quite a GPU, less is known
            about = torch.cuda.get_device_properties(0)
            text += f" ({about.total_memory / 2**30:.1f} GiB, compute capability {about.major}.{about.minor})"
        yield "device", text
        with suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            yield "driver", f"driver {found.split()[0]}"
    else:
        yield "device", f"CPU, {platform.machine()}"
    yield "torch", f"PyTorch {torch.__version__}" + (f" (CUDA {torch.version.cuda})" if torch.version.cuda else "")
    yield "host", f"Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} CPU cores"
    yield "version", f"nano_db {__version__}"
    yield "date", time.strftime("%Y-%m-%d")


def read_options(flags):
    """(Options, the numbers of the stages to run)"""
    parser = Parser(prog="python -m experiments.gpu", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages (default %(default)g)")
    parser.add_argument("--out", default="out/gpu", help="folder of the report (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default %(default)s)")
    parser.add_argument("--preset", choices=("gpu", "tiny"), help="of stages 2 to 4 (default: gpu; on a CPU tiny)")
    parser.add_argument("--stages", default="1,2,3,4", help="only these, like 1,3 (default: all)")
    args = parser.parse_args(flags)
    if not 0.1 <= args.minutes <= 100_000:
        raise UsageError(f"--minutes {args.minutes:g}: give a number from 0.1 to 100000")
    chosen = args.stages.split(",")
    if not {*chosen} <= {"1", "2", "3", "4"}:
        raise UsageError(f"--stages {args.stages}: give numbers from 1 to 4, like 1,3")
    preset = args.preset or ("gpu" if args.device == "cuda" else "tiny")
    return Options(args.device, preset, args.minutes, Path(args.out)), {int(number) for number in chosen}


def run_stages(options, chosen, whole, end):
    """Run the stages until `end`, fill the report `whole`, and print a line each."""
    for number, (name, (question, work, share)) in enumerate(STAGES.items(), 1):
        if number not in chosen:
            continue
        print(f"{number}. {question:24}", end="", flush=True)
        stage = {"number": number, "name": name, "question": question, "status": report.RUNNING, "records": []}
        whole["stages"].append(stage | {"seconds": 0.0})
        limit = min(end - time.monotonic(), 60 * options.minutes * share) - RESERVE
        run_stage(work, replace(options, seconds=limit), whole)
        left = max(0, round(end - time.monotonic()))
        print(f"{report.verdict(whole['stages'][-1])}; {left // 60}:{left % 60:02} min left", flush=True)


def run_stage(work, options, whole):
    """Run the last stage of the report for at most options.seconds. What is found is written at once."""
    stage, clock = whole["stages"][-1], time.monotonic()
    report.write(whole, options.out)
    try:
        if options.seconds < RESERVE:
            raise TimeoutError
        with closing(found_by(work, options)) as records:
            for record in records:
                stage["records"].append(record)
                stage["seconds"] = time.monotonic() - clock
                report.write(whole, options.out)
        stage["status"] = report.PASSED
    except TimeoutError:
        stage["status"] = report.PARTLY if stage["records"] else report.NO_TIME
    except RuntimeError as error:
        stage["records"].append({"passed": False, "said": str(error)})
    if any(record.get("passed") is False for record in stage["records"]):
        stage["status"] = report.FAILED
    stage["seconds"] = time.monotonic() - clock
    report.write(whole, options.out)


def main(flags=None):
    options, chosen = read_options(flags)
    end = time.monotonic() + 60 * options.minutes
    if (options.out / "report.json").exists():
        raise UsageError(f"{options.out} holds a report: choose another --out, or move that folder away")
    with tempfile.TemporaryDirectory() as folder, explained("the device does not answer", (TimeoutError, RuntimeError)):
        about = dict(found_by(describe, replace(options, out=Path(folder), seconds=120.0)))
    if "device" not in about:
        advice = "with --device cpu the same stages run on a CPU, at preset tiny"
        raise UsageError(f"PyTorch {torch.__version__} finds no CUDA device: {advice}")
    with explained(f"cannot make {options.out}: choose another --out", OSError):
        options.out.mkdir(parents=True, exist_ok=True)
    words = shlex.join(sys.argv[1:] if flags is None else flags)
    whole = {"command": f"python -m experiments.gpu {words}".rstrip(), "about": about, "stages": []}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends a run as Ctrl-C does
    try:
        run_stages(options, chosen, whole, end)
    except KeyboardInterrupt:
        print(f"\nstopped; what was found is in {options.out / 'report.md'}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(options.out / "report.md")
    if any(stage["status"] == report.FAILED for stage in whole["stages"]):
        sys.exit(1)


if __name__ == "__main__":
    command(main)
