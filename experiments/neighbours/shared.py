"""What surrounds a neighbour's training loop: its command line, progress lines, accuracy, and result.json.

The other files here are the methods, and can be read without it. Runs take minutes, so nothing is saved before
the end.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

import torch

from data.images import NAMES
from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import make_folder, write_json
from nano_db.trainer.command import command
from nano_db.trainer.run import VERSIONS
from nano_db.trainer.settings import Parser


def whole(minimum):
    """A flag's type: a whole number, at least `minimum`."""

    def number(text):
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {text}")
        return int(text)

    return number


def positive(text):
    if not (math.isfinite(float(text)) and float(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return float(text)


def read_arguments(name, description, methods, add_flags, **defaults):
    """The command line. add_flags(parser) adds a method's own flags; `defaults` are for the common ones, and for
    weight_decay and final_rate, which make_optimizer and learning_rate (trainer/run.py) need.
    """
    parser = Parser(prog=f"python -m experiments.neighbours.{name}", description=description, allow_abbrev=False)
    if methods:
        parser.add_argument("--method", choices=methods, default=methods[0])
    add_flags(parser)
    parser.add_argument("--data", choices=NAMES, default="glyphs")
    parser.add_argument("--glyphs", type=whole(100), default=18_000, help="how many glyphs to draw for training")
    parser.add_argument("--augment", choices=("none", "flip", "standard"), default="standard")
    parser.add_argument("--steps", type=whole(1), help="training steps per network")
    parser.add_argument("--warmup", type=whole(0), help="warm-up steps (default: a tenth of --steps, but at most 45)")
    parser.add_argument("--batch-size", type=whole(2), default=128)
    parser.add_argument("--learning-rate", type=positive, default=1e-3, help="peak, followed by cosine decay")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--test-images", type=whole(0), default=0, help="test images to evaluate on; 0: all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    usual = f"out/{name}-<method>" if methods else f"out/{name}"
    parser.add_argument("--out", help=f"folder for result.json (default: {usual})")
    parser.set_defaults(final_rate=0.1, weight_decay=1e-3, method=name)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if args.warmup is None:
        args.warmup = min(45, args.steps // 10)
    if args.warmup > args.steps:
        never = "the learning rate would never reach its peak"
        raise UsageError(f"--warmup {args.warmup} is longer than --steps {args.steps}: {never}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda is not available on this machine; use --device cpu (or auto)")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.name, args.out = name, Path(args.out or usual.replace("<method>", args.method))
    if (args.out / "config.json").exists():
        raise UsageError(f"{args.out} holds a run of a training script: choose another --out")
    make_folder(args.out)
    if (args.out / "result.json").exists():
        print(f"{args.out / 'result.json'} is there already, and will be replaced")
    return args


def progress(label, step, args, losses):
    """Print the last losses now and then; they must be finite. losses: tensors without a gradient."""
    if (step + 1) % max(1, args.steps // 10) == 0:
        numbers = [float(loss) for loss in losses]
        if not all(map(math.isfinite, numbers)):
            raise UsageError(f"{label}: the loss is {numbers} at step {step + 1}; try a smaller --learning-rate")
        print(f"{label}  step {step + 1}/{args.steps}  loss", *(f"{n:.4f}" for n in numbers), flush=True)


@torch.no_grad()
def share_right(scores, images, args):
    """Share of test images whose class has the highest of scores(x), (B, V). Noise in it comes from the seed."""
    torch.manual_seed(args.seed)
    batches = images.test_batches(256, args.test_images, args.device)
    right = torch.cat([scores(x).argmax(-1) == labels for x, labels in batches])
    return float(right.float().mean())


def report(args, images, metrics, networks, memory, seconds):
    """Write result.json, which compare.py reads, and print it. networks: the trained networks that are
    kept. memory: bytes of the largest in training (trainer/memory.py). seconds: for one step of each.
    """
    result = {"script": "vit", "method": args.method, "blocks": len(networks), "steps": args.steps}  # train_vit's task
    parameters = sum(p.numel() for p in torch.nn.ModuleList(networks).parameters())  # shared ones count once
    flags = shlex.join(["python", "-m", f"experiments.neighbours.{args.name}", *sys.argv[1:]])
    result |= {"command": flags, "seed": args.seed, "device": args.device, "versions": VERSIONS, "metrics": metrics}
    result |= {"data_sha256": images.sha256, "parameters": parameters, "memory_bytes": memory}
    result["seconds_per_step_all_blocks"] = seconds
    result["settings"] = {name: value for name, value in vars(args).items() if name != "out"}
    write_json(args.out / "result.json", result)
    mebibytes = ", ".join(f"{part} {count / 2**20:.2f}" for part, count in memory.items())
    print(f"{metrics}\ntraining MiB, the largest network: {mebibytes}\nseconds per step, all networks: {seconds:.3f}")
    print(args.out / "result.json")


def start(main):
    """trainer.command.command, for runs that leave nothing behind if they are interrupted."""

    def guarded():
        try:
            main()
        except KeyboardInterrupt:
            print("\nstopped: these runs are short, and save nothing before they end", file=sys.stderr)
            sys.exit(130)

    command(guarded)
