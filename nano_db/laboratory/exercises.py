"""What the notebooks of the course share: the word on a student's answer, and the size of a run."""

import os


def check(name, passed, hint):
    """Print one line: "1.2: right", "1.2: not yet. <hint>", or that nothing has been tried yet, without the hint.

    passed: a function without arguments, so that an unfinished answer raises in here and not in the notebook. Whatever
    it returns is taken as a bool. An exception is "not yet", and its name is shown; but NotImplementedError is the stub
    itself, which gets no hint: thinking comes first.
    """
    try:
        right, stopped_by = bool(passed()), ""
    except NotImplementedError:
        return print(f"{name}: to do. Write your answer into the cell above, and run both again.")
    except Exception as error:
        right, stopped_by = False, f" ({type(error).__name__})"
    print(f"{name}: right" if right else f"{name}: not yet. {hint}{stopped_by}")


def reduced(full, small):
    """`full`, or `small` where the environment has NANO_DB_REDUCED set: for tests that have seconds."""
    return small if os.environ.get("NANO_DB_REDUCED") else full
