"""How does this project run on your GPU? The whole answer from one command, in nine minutes:

    python -m experiments.gpu --minutes 9 --out out/gpu

Four stages, the most important first: (1) does it work, (2) what does a step cost, (3) how much memory does a step
take, (4) training runs in blocks and end to end. Each stage has a process and a time limit of its own, and its results
are written to report.md and report.json at once, so neither a failure nor the time limit can lose them. Nothing is
downloaded. With --minutes 60 stage 4 trains all five scripts, with --minutes 600 also the paper's vision transformer on
CIFAR-100. Without a GPU, --device cpu runs the parts that work on a CPU.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from experiments.gpu import job, memory, report, speed, works
from experiments.gpu.apart import describe, found_by
from experiments.gpu.cases import Options
from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import make_folder
from nano_db.trainer.command import command
from nano_db.trainer.distributed import is_one_of_several
from nano_db.trainer.report import is_taken
from nano_db.trainer.settings import Parser


class Stage(NamedTuple):
    """share: the part of the total time that is reserved for it while others run."""

    number: int
    name: str
    question: str
    work: Callable
    share: float


STAGES = (
    Stage(1, "works", "Does it work?", works.run, 0.2),
    Stage(2, "speed", "What does a step cost?", speed.run, 0.15),
    Stage(3, "memory", "How much memory does a step take?", memory.run, 0.12),
    Stage(4, "job", "Training runs", job.run, 0.4),
)
RESERVE = 5  # seconds: a stage with less is not started, and this much is kept for the end
ANSWERS = 120  # seconds within which the device must identify itself


def read_options(flags):
    """(Options, the stages to run)"""
    parser = Parser(prog="python -m experiments.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages (default %(default)g)")
    parser.add_argument("--out", default="out/gpu", help="folder for the report (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default %(default)s)")
    parser.add_argument("--preset", choices=("gpu", "tiny"), help="scale of stages 2 to 4 (default gpu; on a CPU tiny)")
    parser.add_argument("--stages", default="1,2,3,4", help="numbers of the stages to run (default %(default)s)")
    args = parser.parse_args(flags)
    if not 1 <= args.minutes <= 100_000:
        raise UsageError(f"--minutes {args.minutes:g}: give a number from 1 to 100000")
    chosen = {part.strip() for part in args.stages.split(",")}
    if not chosen <= {"1", "2", "3", "4"}:
        raise UsageError(f"--stages {args.stages!r}: give numbers from 1 to 4, like 1,3")
    out = Path(args.out)
    if not args.out or is_taken(out):
        raise UsageError(f"--out {args.out!r} is not an empty folder: choose another one, or move it away")
    if is_one_of_several():
        raise UsageError("this command measures a single process: start it without torchrun")
    preset = args.preset or ("gpu" if args.device == "cuda" else "tiny")
    return Options(args.device, preset, args.minutes, out), [stage for stage in STAGES if str(stage.number) in chosen]


def run_stages(stages, options, whole, end):
    """Run the stages until `end`, fill the report `whole`, and print one line per stage."""
    found = [{"number": s.number, "name": s.name, "question": s.question, "status": report.NOT_BEGUN} for s in stages]
    whole["stages"] = [stage | {"seconds": 0.0, "at": "", "records": []} for stage in found]
    for i, (stage, result) in enumerate(zip(stages, whole["stages"], strict=True)):
        kept = RESERVE + 60 * options.minutes * sum(later.share for later in stages[i + 1 :])
        run_stage(stage.work, replace(options, seconds=end - time.monotonic() - kept), result, whole)
        left = max(0, round(end - time.monotonic()))
        print(f"{report.title(result):38}{report.verdict(result)}; {left // 60}:{left % 60:02} left", flush=True)
        for failed in [record for record in result["records"] if record.get("passed") is False][:1]:
            print(f"   {report.miss(failed)}", flush=True)


def run_stage(work, options, stage, whole):
    """Run one stage for at most options.seconds, and write its results at once. stage: its part of the report.
    Strings among the results name what it does next.
    """
    clock, stage["status"] = time.monotonic(), report.RUNNING
    try:
        save(whole, options)
        if options.seconds < RESERVE:
            raise TimeoutError
        with closing(found_by(work, options)) as everything:
            for found in everything:
                stage["seconds"] = time.monotonic() - clock
                if isinstance(found, str):
                    stage["at"] = found
                else:
                    stage["records"].append(found)
                    save(whole, options)
        stage["status"] = report.PASSED
    except TimeoutError:
        stage["status"] = report.PARTLY
        if stage["at"] and not any(record.get("passed") for record in stage["records"]):
            said = f"no result in {options.seconds:.0f} s; last activity: {stage['at']}"
            stage["records"].append({"passed": False, "said": said})
    except RuntimeError as error:
        stage["records"].append({"passed": False, "said": f"{error}; last activity: {stage['at'] or 'start'}"})
    except KeyboardInterrupt:
        stage["status"] = report.STOPPED
        raise
    finally:
        judged = [record.get("passed") for record in stage["records"]]
        if stage["status"] in (report.PASSED, report.PARTLY) and True not in judged:
            stage["status"] = report.NO_TIME
        if False in judged:
            stage["status"] = report.FAILED
        save(whole, options)


def save(whole, options):
    try:
        report.write(whole, options.out)
    except UsageError as error:  # there may be room again for the next result
        print(f"warning: {error}", file=sys.stderr)


def ask_device(options):
    """{name: text} of what is known about the device. Raises UsageError if it does not answer, or there is none."""
    about = {}
    try:
        for found in found_by(describe, replace(options, seconds=ANSWERS)):
            about |= found
    except (TimeoutError, RuntimeError) as error:
        about["said"] = f"the device does not answer ({str(error) or f'in {ANSWERS} s'})"
    if "device" not in about:
        raise UsageError(f"{about['said']}; --device cpu runs the parts that work on a CPU")
    return {name: text for name, text in about.items() if name not in ("passed", "said")}


def start(stages, options, end):
    """Ask the device what it is, then run the stages until `end`. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:  # made by this process, because a stage's may be killed
        options = replace(options, scratch=Path(folder))
        about = ask_device(replace(options, out=options.scratch))
        make_folder(options.out)
        flags = f"--minutes {options.minutes:g} --device {options.device} --preset {options.preset}"
        whole = {"command": f"python -m experiments.gpu {flags}", "about": about}
        print(f"{about['device']}: results are written to {options.out / 'report.md'} as they come", flush=True)
        run_stages(stages, options, whole, end)
    return 1 if any(stage["status"] == report.FAILED for stage in whole["stages"]) else 0


def main(flags=None):
    begun = time.monotonic()
    options, stages = read_options(flags)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends a run as Ctrl-C does
    try:
        code = start(stages, options, begun + 60 * options.minutes)
    except KeyboardInterrupt:
        path = options.out / "report.md"
        found = f"the results so far are in {path}" if path.exists() else "there are no results yet"
        print(f"\nstopped; {found}", file=sys.stderr)
        code = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    command(main)
