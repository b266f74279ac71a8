"""The tables of results, from one command: `python -m experiments.results --jobs 2`

It runs the commands of the tables (tables.py) that have no file yet, on the CPU, with one thread each. The results
go into results/<scale>: one JSON file per run with its exact command, versions and machine, and summary.md. You can
interrupt it at any time; run the same command again to resume. A run that fails does not stop the others.
"""

import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from experiments.compare import read_result
from experiments.plan import largest_network
from experiments.summary import depth_panels, fill, groups, memory_panels, read_records, summary
from experiments.tables import SCALES, SCRIPTS
from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import make_folder, read_config, read_metrics, write_json, write_text
from nano_db.trainer.command import command
from nano_db.trainer.memory import training_bytes
from nano_db.trainer.run import autocast, make_optimizer, stop_requests
from nano_db.trainer.settings import Parser

ROOT = Path(__file__).resolve().parents[1]


def run_all(todo, jobs, out, folder):
    """Run the experiments in `todo`, `jobs` at a time. Returns "name (its last line)" of each that failed.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM, once the runs that were started have saved.
    """
    waiting, running, failed, began = list(todo), {}, [], time.monotonic()
    with stop_requests() as stop:
        try:
            while (waiting or running) and not stop:
                unfinished = {experiment.file(seed) for experiment, seed in (*waiting, *running.values())}
                free = [job for job in waiting if job[0].init_from(job[1]) not in unfinished]
                for job in free[: jobs - len(running)]:
                    waiting.remove(job)
                    running[start(*job, out)] = job
                for process in [process for process in running if process.poll() is not None]:
                    experiment, seed = running.pop(process)
                    name, done = experiment.file(seed), len(todo) - len(waiting) - len(running)
                    if process.returncode:
                        log = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                        failed.append(f"{name} ({log.strip().rpartition(chr(10))[2]})")
                    else:
                        keep_record(experiment, seed, out, folder, jobs)
                    minutes = (time.monotonic() - began) / done * (len(todo) - done) / 60
                    state = "FAILED" if process.returncode else "done"
                    print(f"{done}/{len(todo)} {name}: {state}, about {minutes:.0f} min left", flush=True)
                time.sleep(0.1)
        finally:
            for process in running:
                process.terminate()  # it saves, and then exits
            for process in running:
                process.wait()
    if stop:
        raise KeyboardInterrupt("progress is saved: run the same command again to resume")
    return failed


def start(experiment, seed, out):
    """Start a run; what it prints goes into a .log beside its folder."""
    folder = (out / experiment.file(seed)).resolve()
    make_folder(folder.parent)
    line = [sys.executable, *experiment.command(seed, folder.parents[1]), "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        # A session of its own: Ctrl-C reaches only us, and we signal each run once.
        where = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(line, env=environment, **where)


def keep_record(experiment, seed, out, folder, jobs):
    """Write the JSON file of a run that has ended."""
    run = out / experiment.file(seed)
    result = read_result(run)
    depends_on = read_config(run)["depends_on"]
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    names = re.findall(r"model name\s*: (.*)", about)
    machine = {"cpu": (names or [platform.machine()])[0], "cores": os.cpu_count()}
    machine |= {"jobs at a time": jobs, "threads of a job": 1}
    record = {"experiment": experiment.name, "seed": seed, "command": experiment.command_line(seed), "machine": machine}
    record |= {name: depends_on[name] for name in ("data_sha256", "init_from_sha256") if depends_on.get(name)}
    record["settings"] = {name: value for name, value in result["settings"].items() if name not in ("out", "init_from")}
    record["result"] = {name: value for name, value in result.items() if name != "settings"}
    record["result"]["checkpointed_bytes"] = checkpointed_bytes(experiment.script, result["settings"])
    if result["settings"]["rounds"] > 1:  # the curve
        rounds = read_metrics(run, "evaluation")
        record["evaluations"] = [{name: v for name, v in r.items() if isinstance(v, int | float)} for r in rounds]
    write_json(folder / f"{experiment.file(seed)}.json", record)


def checkpointed_bytes(name, settings):
    """Counts the training memory, by part, that a run would need with checkpointed activations."""
    script = SCRIPTS[name]
    settings = replace(script.Settings(**settings), checkpoint_activations=True)
    network, batch = largest_network(script, settings, *script.prepare(settings))
    return training_bytes(network, batch, make_optimizer(network, settings), autocast(settings))


def main():
    parser = Parser(prog="python -m experiments.results", description=__doc__, allow_abbrev=False)
    parser.add_argument("--scale", choices=tuple(SCALES), default="laptop", help="the preset (default laptop)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1; at most as many as cores)")
    parser.add_argument("--only", metavar="TABLE,...", help="only these tables (default: all of the scale)")
    parser.add_argument("--out", type=Path, default="out/results", help="where the runs are kept (default out/results)")
    parser.add_argument("--results", type=Path, default="results", help="where the tables are kept (default results)")
    parser.add_argument("--list", action="store_true", help="run nothing: list what is left to run")
    parser.add_argument("--summary-only", action="store_true", help="run nothing: make the tables from the runs so far")
    pages = "also update the marked tables in these Markdown files (default README.md and docs/*.md)"
    parser.add_argument("--readme", nargs="*", type=Path, metavar="FILE", help=pages)
    args = parser.parse_args()
    out, folder, todo, failed = args.out / args.scale, args.results / args.scale, {}, []
    found = read_records(folder, args.scale)[0]
    only = args.only.split(",") if args.only else groups(found)
    if wrong := set(only) - set(groups(found)):
        raise UsageError(f"--only {args.only}: there is no table {min(wrong)!r}; tables: {', '.join(groups(found))}")
    if lost := [page for page in args.readme or () if not page.is_file()]:
        raise UsageError(f"--readme {lost[0]}: there is no such file")
    if args.jobs < 1:
        raise UsageError("--jobs must be at least 1")
    for experiment, records in found.items():
        missing = sorted(set(range(experiment.seeds)) - {record["seed"] for record in records})
        if experiment.group in only:
            todo |= {experiment.file(seed): (experiment, seed) for seed in missing}  # once, though in two tables
    files = {experiment.file(seed): (experiment, seed) for experiment in found for seed in range(experiment.seeds)}
    networks = {experiment.init_from(seed) for experiment, seed in todo.values()} - {""}
    todo |= {name: files[name] for name in networks if not (out / name).exists()}  # a record has no weights
    if args.list:
        for name, experiment in {e.name: e for e in found if e.group in only}.items():  # a row may be in two tables
            count = sum(experiment.file(seed) in todo for seed in range(experiment.seeds))
            print(f"{name:28} {count} of {experiment.seeds} to run  {experiment.command_line(0)}")
        again = [name for name in todo if name in networks]
        kept = f" (among them {', '.join(again)}: others start from their weights)" if again else ""
        return print(f"to run: {len(todo)}{kept}; most runs of preset laptop take about eight minutes on one core")
    make_folder(folder, "--results")
    if not args.summary_only:
        first = sorted(todo.values(), key=lambda job: job[1])  # seed 0 of every row: whole tables can be read early
        failed = run_all(first, args.jobs, out, folder)

    found, stale = read_records(folder, args.scale)
    for path in stale:
        print(f"{path} is left out: its flags are no longer those of tables.py")
    write_text(folder / "summary.md", summary(found, args.scale))
    print(f"written: {folder / 'summary.md'}")
    from experiments.figures import draw_depth, draw_equal_memory  # matplotlib is slow to import

    for name, draw, panels in (
        ("depth.png", draw_depth, depth_panels(found)),
        ("equal_memory.png", draw_equal_memory, memory_panels(found)),
    ):
        if panels:
            draw(folder / name, panels)
    if args.readme is not None:
        for page in args.readme or [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
            write_text(page, fill(page.read_text(encoding="utf-8"), args.results))
    if failed:
        raise UsageError(f"{len(failed)} of {len(todo)} runs failed: {'; '.join(failed)}. Their logs are in {out}")


if __name__ == "__main__":
    command(main)
