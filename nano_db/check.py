"""What a run's folder holds, and what it is worth: `python -m nano_db.check out/run [flags of the script]`.

It says which blocks are there and at which step, refuses files that do not belong together (exit code 2, naming what
differs), and names blocks that still have steps to go (exit code 1). A complete network is evaluated, and samples are
drawn from it, by the script that trained it: `python train_<script>.py --eval-only --out out/run [flags]`.
"""

import subprocess
import sys
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.run import read_folder
from nano_db.settings import Parser, command

CUTS = ("blocks", "layers", "layer_split", "partition", "overlap")  # the settings that cut the network up,
CUTS += ("noise", "p_mean", "p_std", "sigma_min", "sigma_max", "schedule")  # and the noise that is cut


def script_path(config):
    """The script that a config.json names: one of those beside nano_db, and never a path of the file's choice."""
    name = config["about"].get("script")
    scripts = {path.stem.removeprefix("train_"): path for path in Path(__file__).parent.parent.glob("train_*.py")}
    if not isinstance(name, str) or name not in scripts:
        raise UsageError(f"config.json names the script {name!r}; there are {', '.join(sorted(scripts))}")
    return scripts[name]


def check_files(folder):
    """Print what stands where, and return (config, unfinished blocks). Raises UsageError for files that do not belong
    together.
    """
    config, states = read_folder(folder, whole=True)
    settings, script = config["settings"], script_path(config)
    steps, networks = settings.get("steps"), settings.get("ensemble" if settings.get("baseline") else "blocks")
    if not isinstance(steps, int) or not isinstance(networks, int) or not 0 < networks <= 10_000:
        raise UsageError(f"{folder}/config.json is damaged: it speaks of {networks!r} networks and {steps!r} steps")
    if strange := [b for b in states if not 0 <= b < networks]:
        raise UsageError(f"{folder}/block_{strange[0]}.pt: this run has {networks} blocks, numbered from 0")
    print(f"{folder}: a run of {script.name}, {networks} network(s) to train for {steps} steps each")
    unfinished = []
    for b in range(networks):
        step = states[b]["step"] if b in states else 0
        if step < steps:
            unfinished.append(b)
        word = "complete" if step == steps else "to be continued" if step else "missing"
        print(f"  block {b}  step {step} of {steps}  {word}")
    if states:
        cuts = ", ".join(f"{name} {settings[name]!r}" for name in CUTS if name in settings)
        print(f"settings: the same in {len(states)} block file(s) and config.json")
        print(f"data: the same, sha256 {config['about'].get('data_sha256')}")
        print(f"partition: the same, as it follows from the data and {cuts}")
    return config, unfinished


def main():
    parser = Parser(prog="python -m nano_db.check", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", help="output folder of a run")
    parser.add_argument("--files-only", action="store_true", help="do not evaluate")
    args, flags = parser.parse_known_args()
    config, unfinished = check_files(args.folder)
    if unfinished:
        named = ",".join(map(str, unfinished))
        print(f"still to train: --only {named} (with the run's own flags), or copy the files of these blocks here")
        sys.exit(1)
    if not args.files_only:
        sys.stdout.flush()
        run = [sys.executable, str(script_path(config)), "--eval-only", "--out", args.folder, *flags]
        sys.exit(subprocess.call(run))


if __name__ == "__main__":
    command(main)
