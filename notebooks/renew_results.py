"""Renew what the notebooks print and draw of results/, after `python -m experiments.results` has changed it.

    python notebooks/renew_results.py

Cells tagged `results` need no training. With the setup and the imports, they are run in a kernel of their own.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_notebook

HERE = Path(__file__).resolve().parent


def only_results(notebook):
    """The setup, the imports, and the cells tagged `results`, after them."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return new_notebook(cells=[*code[:2], *(cell for cell in code if "results" in cell.metadata.get("tags", []))])


def renew(path):
    """Run these cells of a notebook, and write it with their new outputs. Counts of cells stay as they were."""
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.get("execution_count") for cell in notebook.cells]
    some = only_results(notebook)  # the same cells, not copies
    NotebookClient(some, resources={"metadata": {"path": str(HERE)}}, timeout=600, record_timing=False).execute()
    for cell, count in zip(notebook.cells, counts, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    nbformat.write(notebook, path)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        if len(only_results(nbformat.read(path, as_version=4)).cells) > 2:
            renew(path)
            print(f"renewed: {path.name}")
