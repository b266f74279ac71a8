"""Runs side by side: `python -m experiments.compare out/a out/b ...` Ratios to the first run are in brackets."""

from pathlib import Path

from experiments.summary import markdown, read_json
from nano_db.errors import UsageError
from nano_db.trainer.command import command
from nano_db.trainer.settings import Parser

KEYS = ("script", "blocks", "steps", "metrics", "parameters", "memory_bytes", "seconds_per_step_all_blocks")


def read_result(folder):
    return read_json(Path(folder) / "result.json", KEYS, "finish that run first, or run it again")


def main():
    parser = Parser(prog="python -m experiments.compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of finished runs")
    args = parser.parse_args()
    results, names = [read_result(folder) for folder in args.folders], [folder.name for folder in args.folders]
    if len(scripts := {result["script"] for result in results}) > 1:
        raise UsageError(f"runs of different scripts cannot be compared: {', '.join(sorted(scripts))}")
    metrics = [result["metrics"] for result in results]
    common = [name for name, value in metrics[0].items() if isinstance(value, int | float)]
    columns = {name: [m[name] for m in metrics] for name in common if all(name in m for m in metrics)}
    columns["parameters"] = [result["parameters"] for result in results]
    columns["training MiB"] = [result["memory_bytes"]["total"] / 2**20 for result in results]
    columns["ms per step, all blocks"] = [1000 * result["seconds_per_step_all_blocks"] for result in results]
    rows = [[name, str(result["blocks"]), str(result["steps"])] for name, result in zip(names, results, strict=True)]
    for numbers in columns.values():
        for row, number in zip(rows, numbers, strict=True):
            shown = f"{number:,}" if isinstance(number, int) else f"{number:,.4g}"
            row.append(f"{shown} ({number / numbers[0]:.3f})" if numbers[0] else shown)
    print(markdown(["run", "networks", "steps", *columns], rows))


if __name__ == "__main__":
    command(main)
