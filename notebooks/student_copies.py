"""Copies of the notebooks for a class: without solutions, and without the cells that give an answer away.

    python notebooks/student_copies.py --out students

The folder must be new or empty, and lie beside `notebooks`, in the repository's root: a notebook looks for nano_db one
folder up. Outputs are removed, too. The copies keep the checks, and with them the hints.
"""

import argparse
import shutil
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent


def without_solutions(notebook):
    """The notebook as students get it: cells tagged `solution` are left out, outputs are empty."""
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the copies, for example students")
    out = parser.parse_args().out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = any(out.iterdir())  # perhaps by copies that hold answers
    except OSError:  # it cannot be made
        taken = True
    if taken:
        print(f"{parser.prog}: error: --out {out}: name a folder that is new or empty", file=sys.stderr)
        sys.exit(2)
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        nbformat.write(without_solutions(nbformat.read(path, as_version=4)), out / path.name)
    shutil.copy(HERE / "README.md", out / "README.md")
    shutil.copytree(HERE / "pictures", out / "pictures", dirs_exist_ok=True)
    print(f"{len(list(out.glob('*.ipynb')))} notebooks without solutions: {out}")
    if out.parent != HERE.parent:
        print(f"to run them, move the folder beside {HERE.name}, into {HERE.parent}")


if __name__ == "__main__":
    main()
