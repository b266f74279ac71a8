"""Is a run complete, and do its files belong together? `python -m nano_db.laboratory.check out/run [flags]`

Files that do not belong together are refused (exit code 2), blocks that have steps to go are named (exit code 1). A
complete network is evaluated: `python train_<script>.py --eval-only --out out/run [flags]`.
"""

import subprocess
import sys
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.machinery.files import read_folder
from nano_db.machinery.run import command
from nano_db.machinery.settings import Parser


def script_path(config):
    """The script that a config.json names: one of those beside nano_db, and never a path of the file's choice."""
    name = config.get("script")
    scripts = {path.stem.removeprefix("train_"): path for path in Path(__file__).parents[2].glob("train_*.py")}
    if not isinstance(name, str) or name not in scripts:
        raise UsageError(f"config.json names the script {name!r}; there are {', '.join(sorted(scripts))}")
    return scripts[name]


def main():
    parser = Parser(prog="python -m nano_db.laboratory.check", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", help="output folder of a run")
    parser.add_argument("--files-only", action="store_true", help="do not evaluate")
    args, flags = parser.parse_known_args()
    config, states = read_folder(args.folder, whole=True)
    script, settings = script_path(config), config["settings"]
    steps, blocks = settings.get("steps"), settings.get("ensemble" if settings.get("baseline") else "blocks", 1)
    if not isinstance(steps, int) or not isinstance(blocks, int) or not 0 < blocks <= 10_000:
        raise UsageError(f"{args.folder}/config.json is damaged: it speaks of {blocks!r} blocks and {steps!r} steps")
    if strange := [b for b in states if not 0 <= b < blocks]:
        raise UsageError(f"{args.folder}/block_{strange[0]}.pt: this run has {blocks} blocks, numbered from 0")
    reached = [states[b]["step"] if b in states else 0 for b in range(blocks)]
    for b, step in enumerate(reached):
        state = "complete" if step == steps else "to be continued" if step else "missing"
        print(f"block {b}  step {step} of {steps}  {state}")
    print(f"settings, data, partition: the same in config.json and {len(states)} block file(s)")
    if unfinished := ",".join(str(b) for b, step in enumerate(reached) if step < steps):
        print(f"still to train: {script.name} --only {unfinished} (and the run's own flags), or copy these files here")
        sys.exit(1)
    if not args.files_only:
        sys.stdout.flush()
        sys.exit(subprocess.call([sys.executable, str(script), "--eval-only", "--out", args.folder, *flags]))


if __name__ == "__main__":
    command(main)
