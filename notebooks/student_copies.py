"""Copies of the notebooks for a class: without solutions, and without the cells that give an answer away.

    python notebooks/student_copies.py --out students

The folder must lie beside `notebooks`, in the repository's root: a notebook looks for nano_db one folder up. Outputs
are removed, too. The copies keep the checks, and with them the hints.
"""

import argparse
import shutil
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
BESIDE = ("README.md", "pictures", ".ipynb_checkpoints")  # the index; and what Jupyter leaves


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
        others = [path for path in out.iterdir() if path.suffix != ".ipynb" and path.name not in BESIDE]
    except OSError:  # it cannot be made
        others = [out]
    if out == HERE or others:
        print(f"{parser.prog}: error: --out {out}: name another folder, beside {HERE.name}", file=sys.stderr)
        sys.exit(2)
    for path in sorted(HERE.glob("*.ipynb")):
        nbformat.write(without_solutions(nbformat.read(path, as_version=4)), out / path.name)
    shutil.copy(HERE / "README.md", out / "README.md")
    shutil.copytree(HERE / "pictures", out / "pictures", dirs_exist_ok=True)
    print(f"{len(list(out.glob('*.ipynb')))} notebooks without solutions: {out}")
    if out.parent != HERE.parent:
        print(f"to run them, move the folder beside {HERE.name}, into {HERE.parent}")


if __name__ == "__main__":
    main()
