"""The tables of results, by one command: `python -m nano_db.results --scale cpu --jobs 2`.

It runs the scripts for every experiment of the scale (experiments.py) that has no file yet, and writes what comes out
into results/<scale>: a JSON file a run with its exact command, versions and machine, summary.md, and the pictures.
Stop it whenever you like; the same command goes on, in the middle of a run, too. A run that fails is named at the end,
and does not stop the others.
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from nano_db.compare import read_result
from nano_db.errors import UsageError
from nano_db.experiments import GROUPS, SCALES, SECONDS, experiments
from nano_db.files import write_json, write_text
from nano_db.progress import stop_requests
from nano_db.run import read_config
from nano_db.settings import Parser, command
from nano_db.summary import fill, read_record, read_records, summary

ROOT = Path(__file__).resolve().parent.parent


def missing(scale, folder, only=()):
    """[(experiment, seed)] that has no file in `folder`, or one of another command: the first seed of every row, then
    the second, so that whole tables can be read early. only: groups; none means all.
    """
    todo = []
    for experiment in experiments(scale):
        for seed in range(experiment.seeds):
            path = folder / f"{experiment.file(seed)}.json"
            done = path.exists() and read_record(path)["command"] == experiment.command_line(seed)
            if not done and (not only or experiment.group in only):
                todo.append((experiment, seed))
    return sorted(todo, key=lambda job: job[1])


def run_all(todo, jobs, out, folder):
    """Run the experiments in `todo`, `jobs` at a time. Returns [(name, last line it said)] of those that failed.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM, when the runs under way have saved.
    """
    waiting, running, failed, finished, began = list(todo), {}, [], 0.0, time.monotonic()
    whole = sum(weight(experiment) for experiment, _ in todo)
    with stop_requests() as stop:
        try:
            while (waiting or running) and not stop:
                while waiting and len(running) < jobs:
                    process = start(*waiting[0], out)
                    running[process] = waiting.pop(0)
                for process in [process for process in running if process.poll() is not None]:
                    experiment, seed = running.pop(process)
                    name, finished = experiment.file(seed), finished + weight(experiment)
                    said = keep_record(process.returncode, experiment, seed, out, folder, jobs)
                    if said:
                        failed.append((name, said))
                    left = (time.monotonic() - began) * (whole - finished) / finished / 60
                    count = f"{len(todo) - len(waiting) - len(running)}/{len(todo)}"
                    print(f"{count} {name}: {'FAILED' if said else 'done'}, {left:.0f} min left", flush=True)
                time.sleep(0.1)
        finally:
            for process in running:
                process.terminate()  # upon which it saves
            for process in running:
                process.wait()
    if stop:
        raise KeyboardInterrupt
    return failed


def weight(experiment):
    return experiment.seconds or 1.0  # where nobody has measured: all alike


def start(experiment, seed, out):
    """Start a run; what it says goes into a .log beside its folder."""
    folder = (out / experiment.file(seed)).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if experiment.given("--device") == "cpu" else {}
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, *experiment.command(seed), "--out", str(folder)],
            cwd=ROOT,
            env={**os.environ, **threads},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us alone, and we tell each run once
        )


def keep_record(code, experiment, seed, out, folder, jobs):
    """Write the file of a run that has ended. Returns "", or what the run said last, if it failed."""
    run = out / experiment.file(seed)
    if code:
        said = Path(f"{run}.log").read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        return said[-1]
    config, result = read_config(run), read_result(run)
    record = {"experiment": experiment.name, "seed": seed, "command": experiment.command_line(seed)}
    record |= {"machine": machine(result["device"], jobs), "data_sha256": config["about"]["data_sha256"]}
    settings = {name: value for name, value in config["settings"].items() if name not in ("out", "data_dir")}
    write_json(folder / f"{experiment.file(seed)}.json", {**record, "settings": settings, "result": result})
    return ""


def machine(device, jobs):
    """What the run had: the processor, its cores, and how many runs shared it; a GPU's name, if it ran there."""
    found = {"cpu": processor(), "cores": os.cpu_count(), "jobs at a time": jobs}
    if device == "cpu":
        return {**found, "threads of a job": 1}
    import torch  # slow to import, and only needed for the name

    return {**found, "gpu": torch.cuda.get_device_name() if device == "cuda" else device}


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show_plan(scale, todo, jobs):
    """Print every experiment, what is still to run, and how long that should take."""
    open_seeds = {}
    for experiment, seed in todo:
        open_seeds.setdefault(experiment, []).append(seed)
    known = scale in SECONDS
    for group, (title, _) in GROUPS.items():
        rows = [experiment for experiment in experiments(scale) if experiment.group == group]
        minutes = sum(experiment.seeds * experiment.seconds for experiment in rows) / 60
        print(f"\n{group}: {title}" + (f", {minutes:.0f} min of one job in all" if known else ""))
        for e in rows:
            state = f"{e.seeds - len(open_seeds.get(e, []))} of {e.seeds} done"
            cost = f"  {e.seconds / 60:4.1f} min a seed" if known else ""
            print(f"  {e.name:32} {state}{cost}  {e.row}")
    minutes = sum(experiment.seconds for experiment, _ in todo) / 60 / jobs
    print(f"\nto run: {len(todo)}" + (f", about {minutes:.0f} min with --jobs {jobs}" if known else ", time unknown"))


def write_summary(scale, folder):
    """summary.md and the pictures, from the JSON files alone."""
    from nano_db.summary_plots import draw_all  # matplotlib is slow to import

    found, stale = read_records(folder, scale)
    for path in stale:
        print(f"{path} is left out: its flags are no longer those of experiments.py")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.md", summary(folder, scale))
    print(f"written: {folder / 'summary.md'}", *(path.name for path in draw_all(folder, found)))


def main():
    parser = Parser(prog="python -m nano_db.results", description=__doc__, allow_abbrev=False)
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="how large (default cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1; on CPUs no more than cores)")
    parser.add_argument("--only", default="", help=f"these tables alone, like gpt,memory; of {', '.join(GROUPS)}")
    parser.add_argument("--out", default="out/results", help="where the runs are kept (default out/results)")
    parser.add_argument("--results", default="results", help="where the tables are kept (default results)")
    parser.add_argument("--list", action="store_true", help="run nothing: show what there is to run")
    parser.add_argument("--summary-only", action="store_true", help="run nothing: make the tables of what is there")
    parser.add_argument("--readme", help="a Markdown file, like README.md, whose marked tables are renewed, too")
    args = parser.parse_args()
    only = tuple(filter(None, args.only.split(",")))
    if wrong := set(only) - set(GROUPS):
        raise UsageError(f"--only {args.only}: there is no table {sorted(wrong)[0]}; tables: {', '.join(GROUPS)}")
    if args.jobs < 1:
        raise UsageError("--jobs must be at least 1")
    folder, failed = Path(args.results) / args.scale, []
    todo = missing(args.scale, folder, only)
    if args.list:
        return show_plan(args.scale, todo, args.jobs)
    if not args.summary_only:
        folder.mkdir(parents=True, exist_ok=True)
        failed = run_all(todo, args.jobs, Path(args.out) / args.scale, folder)
    write_summary(args.scale, folder)
    if args.readme:
        text = Path(args.readme).read_text()
        write_text(Path(args.readme), fill(text, args.results))
    if failed:
        logs = Path(args.out) / args.scale
        names = "; ".join(f"{name} ({said})" for name, said in failed)
        raise UsageError(f"{len(failed)} of {len(todo)} runs failed: {names}. Their logs are in {logs}")


if __name__ == "__main__":
    command(main)
