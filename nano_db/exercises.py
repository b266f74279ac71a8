"""What the notebooks of the course share: the word on a student's answer, and the size of a run.

To execute notebooks again, each from a clean kernel, and keep the outputs in their files:

    python -m nano_db.exercises notebooks/*.ipynb

Nothing in the files tells when, and random numbers are seeded: on the same machine the outputs come out the same.
tests/test_notebooks.py executes them in reduced size (NANO_DB_REDUCED=1) and reads what `check` printed.
"""

import os
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.settings import Parser, command


def check(name, passed, hint):
    """Print one line: "1.2: right", or "1.2: not yet. <hint>".

    passed: a function without arguments, so that an unfinished answer raises in here and not in the notebook. Whatever
    it returns is taken as a bool, None as "not yet"; an exception is "not yet", too, and its name is shown.
    """
    try:
        verdict, stopped_by = bool(passed()), ""
    except Exception as error:
        verdict, stopped_by = False, f" ({type(error).__name__})"
    print(f"{name}: right" if verdict else f"{name}: not yet. {hint}{stopped_by}")


def reduced(full, small):
    """`full`, or `small` where the environment has NANO_DB_REDUCED set: for tests that have seconds."""
    return small if os.environ.get("NANO_DB_REDUCED") else full


def execute(notebook, folder):
    """Run all cells of a notebook (nbformat's node, changed in place) in a fresh kernel that works in `folder`.

    A cell that raises stops it with a UsageError.
    """
    from nbclient import NotebookClient  # here, because notebooks import this module and need no second Jupyter
    from nbclient.exceptions import CellExecutionError

    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, resources=where, timeout=600, record_timing=False, coalesce_streams=True)
    try:
        client.execute()
    except CellExecutionError as error:
        raise UsageError(f"a cell raised {error.ename}: {error.evalue}") from error
    return notebook


def main():
    import nbformat

    parser = Parser(prog="python -m nano_db.exercises", description="Execute notebooks and keep their outputs.")
    parser.add_argument("notebooks", nargs="+", help="files to execute, in place")
    for path in map(Path, parser.parse_args().notebooks):
        try:
            notebook = nbformat.read(path, as_version=4)
        except (OSError, nbformat.reader.NotJSONError) as error:
            raise UsageError(f"{path} cannot be read as a notebook ({type(error).__name__})") from error
        print(path, flush=True)
        try:
            execute(notebook, path.parent)
        except UsageError as error:
            raise UsageError(f"{path}: {error}; the file is left as it was") from error
        nbformat.write(notebook, path)


if __name__ == "__main__":
    command(main)
