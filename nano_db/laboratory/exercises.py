"""What the notebooks of the course share: the word on a student's answer, and the size of a run.

`python -m nano_db.laboratory.exercises notebooks/*.ipynb` executes notebooks, each from a clean kernel, and keeps the
outputs in their files. On the same machine these come out the same: random numbers are seeded, and nothing tells when.
"""

import os
from pathlib import Path

from nano_db.errors import UsageError
from nano_db.machinery.run import command
from nano_db.machinery.settings import Parser


def check(name, passed, hint):
    """Print one line: "1.2: right", or "1.2: not yet. <hint>".

    passed: a function without arguments, so that an unfinished answer raises in here and not in the notebook. Whatever
    it returns is taken as a bool, None as "not yet"; an exception is "not yet", too, and its name is shown.
    """
    try:
        right, stopped_by = bool(passed()), ""
    except Exception as error:
        right, stopped_by = False, f" ({type(error).__name__})"
    print(f"{name}: right" if right else f"{name}: not yet. {hint}{stopped_by}")


def reduced(full, small):
    """`full`, or `small` where the environment has NANO_DB_REDUCED set: for tests that have seconds."""
    return small if os.environ.get("NANO_DB_REDUCED") else full


def execute(notebook, folder):
    """Run all cells of a notebook (nbformat's node, changed in place) in a fresh kernel that works in `folder`."""
    from nbclient import NotebookClient  # here, because notebooks import this module and need no second Jupyter

    where = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, resources=where, timeout=600, record_timing=False, coalesce_streams=True).execute()


def main():
    import nbformat
    from nbclient.exceptions import CellExecutionError

    parser = Parser(prog="python -m nano_db.laboratory.exercises", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path, help="files to execute, in place")
    for path in parser.parse_args().notebooks:
        print(path, flush=True)
        try:
            nbformat.write(execute(nbformat.read(path, as_version=4), path.parent), path)
        except CellExecutionError as error:
            raise UsageError(
                f"{path}: a cell raised {error.ename}: {error.evalue}; the file is left as it was"
            ) from error
        except (OSError, nbformat.reader.NotJSONError) as error:
            raise UsageError(f"{path} cannot be read as a notebook ({type(error).__name__})") from error


if __name__ == "__main__":
    command(main)
