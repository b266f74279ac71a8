"""Runs side by side: `python -m nano_db.compare out/a out/b ...` prints a Markdown table, ratios to the first run in
brackets, and draws compare.png (or --picture FILE).
"""

import json
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.settings import Parser, command


def read_result(folder):
    path = Path(folder) / "result.json"
    try:
        result = json.loads(path.read_text())
        assert {
            "script",
            "method",
            "blocks",
            "steps",
            "metrics",
            "memory_bytes",
            "seconds_per_step_all_blocks",
        } <= result.keys()
        return result
    except OSError:
        raise UsageError(f"{folder} holds no result.json: finish that run first") from None
    except (ValueError, AttributeError, AssertionError):
        raise UsageError(f"{path} is damaged or no result of nano_db: run its command again") from None


def columns(results):
    """For each run, its numbers by name: the metrics that every run has, then what they cost."""
    common = set.intersection(*(set(result["metrics"]) for result in results))
    for result in results:
        metrics = result["metrics"].items()
        row = {name: value for name, value in metrics if name in common and isinstance(value, (int, float))}
        row["parameters"] = result["parameters"]
        row["training MiB"] = result["memory_bytes"]["total"] / 2**20
        row["ms a step, all blocks"] = 1000 * result["seconds_per_step_all_blocks"]
        yield row


def markdown_table(names, results):
    rows = list(columns(results))
    lines = ["| run | networks | steps | " + " | ".join(rows[0]) + " |", "|---|---|---|" + "---|" * len(rows[0])]
    for name, result, row in zip(names, results, rows, strict=True):
        cells = []
        for column, value in row.items():
            first = rows[0][column]
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
            cells.append(f"{shown} ({value / first:.3f})" if first else shown)
        lines.append(f"| {name} | {result['blocks']} | {result['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = Parser(prog="python -m nano_db.compare", description=__doc__)
    parser.add_argument("folders", nargs="+", help="output folders of finished runs; ratios are to the first")
    parser.add_argument("--picture", default="compare.png", help="where to draw (default compare.png)")
    args = parser.parse_args()
    results = [read_result(folder) for folder in args.folders]
    scripts = {result["script"] for result in results}
    if len(scripts) > 1:
        raise UsageError(f"runs of different scripts cannot be compared: {', '.join(sorted(scripts))}")
    names = [Path(folder).name for folder in args.folders]
    print(markdown_table(names, results))

    from nano_db.plots import (  # matplotlib is slow to import, and errors above should not wait for it
        draw_by_calls,
        draw_comparison,
    )

    draw_comparison(args.picture, names, list(columns(results)))
    print(f"\n{args.picture} drawn")
    by_calls = {name: r["metrics"].get("bits_per_char_by_calls") for name, r in zip(names, results, strict=True)}
    if all(by_calls.values()):
        path = Path(args.picture).with_stem(Path(args.picture).stem + "_by_calls")
        draw_by_calls(path, by_calls, "bits per character")
        print(f"{path} drawn")


if __name__ == "__main__":
    command(main)
