"""What the notebooks of the course share: feedback on a student's answer, and the size of a run."""

import linecache
import marshal
import os
import traceback

import torch

WRONG = {}  # {exercise: its wrong answers so far, each once}: after two of them the second hint is due
NOT_USED = object()


def check(name, answer, passed, hints=("",), otherwise=NOT_USED):
    """Say whether an answer is right, and return what the notebook goes on with, if it uses the answer at all.

    name: of the exercise, like "1.2". answer: a function or a class. passed: answer -> whether it is right; an error in
    it means that it is not, and is shown. hints: the idea; and nearly the code, for a second, different attempt.
    otherwise: what to go on with while the answer is not right. Random numbers are drawn apart: whether an answer is
    checked changes nothing further down.
    """
    used = otherwise is not NOT_USED
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            right, fault = bool(passed(answer)), ""
        except NotImplementedError:
            until = " Until then the notebook goes on with nano_db's own." * used
            print(f"{name}: not answered yet. Write your answer into the cell above, and run both cells.{until}")
            return otherwise if used else None
        except Exception as error:
            right, fault = False, explained(error, answer)
    if right:
        print(f"{name}: right." + " From here on the notebook uses your answer." * used)
    else:
        wrong = WRONG.setdefault(name, set())
        wrong.add(fingerprint(answer))
        print(f"{name}: not yet. {fault}{hints[min(len(wrong), len(hints)) - 1]}")
    return (answer if right else otherwise) if used else None


def functions_of(answer):
    """The functions that an answer consists of: itself, or the methods of a class."""
    parts = vars(answer).values() if isinstance(answer, type) else [answer]
    return [part for part in parts if hasattr(part, "__code__")]


def fingerprint(answer):
    """The same for the same lines of code, wherever and whenever they were run."""
    return tuple(marshal.dumps(part.__code__.replace(co_filename="")) for part in functions_of(answer))


def explained(error, answer):
    """An error as a sentence: type, message and, where it arose in the answer, the line."""
    files = {part.__code__.co_filename for part in functions_of(answer)}
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    text = f"{type(error).__name__}: {str(error).strip() or 'no message'}".rstrip(".")
    if not own:
        return f"{text} (when the check looked at what it returned). "
    line = linecache.getline(own[-1].filename, own[-1].lineno).strip()
    return f"{text}, in line {own[-1].lineno} of the answer's cell:\n    {line}\n"


def reduced(full, small):
    """`full`, or `small` where the environment has NANO_DB_REDUCED set: for tests that have seconds."""
    return small if os.environ.get("NANO_DB_REDUCED") else full
