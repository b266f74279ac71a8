"""What the notebooks of the course share: feedback on a student's answer, and the size of a run."""

import functools
import inspect
import linecache
import os
import traceback
from contextlib import contextmanager

import torch

WRONG = {}  # {exercise: its wrong answers so far, each once}: after two of them the second hint is due
NOT_USED = object()


def check(name, answer, passed, hints=("",), otherwise=NOT_USED):
    """Say whether an answer is right, and return what later cells should use, if they use the answer at all.

    name: of the exercise, like "1.2". answer: a function or a class. passed: answer -> whether it is right; an error in
    it means that it is not, and is shown. hints: the idea; then nearly the code, for a second, different attempt.
    otherwise: what later cells use while the answer is not right. An answer is checked in isolation: the random numbers
    it draws and the torch settings it changes do not affect later cells.
    """
    used = otherwise is not NOT_USED
    until = " Until it is right, the notebook uses nano_db's own version." * used
    right = False
    with apart():
        try:
            right, fault, counts = bool(passed(answer)), "", True
        except KeyboardInterrupt:
            print(f"{name}: stopped before it was checked.{until}")
            return otherwise if used else None
        except (Exception, SystemExit) as error:
            if missing := unwritten(error, answer):
                print(f"{name}: not answered yet. Write {missing}, and run both cells.{until}")
                return otherwise if used else None
            fault = explained(error, answer)
            counts = type(error) is not NameError and not isinstance(error, SyntaxError)
    if right:
        print(f"{name}: right." + " The cells below use your answer: run them again." * used)
        return answer if used else None
    wrong = WRONG.setdefault(name, set())
    if counts:  # a typo is not an attempt
        wrong.add(fingerprint(answer))
    hint = hints[min(len(wrong), len(hints)) - 1] if wrong else ""
    print(f"{name}: not yet. {fault}{hint}{until}")
    return otherwise if used else None


@contextmanager
def apart():
    """The random state, the default dtype and whether gradients are recorded are the same afterwards as before."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)


def functions_of(answer):
    """The functions that an answer consists of: itself, without decorators and fixed arguments; or those of a class."""
    if isinstance(answer, type):
        parts = [getattr(part, "__func__", part) for part in vars(answer).values()]
    else:
        answer = inspect.unwrap(answer)
        answer = answer.func if isinstance(answer, functools.partial) else answer
        parts = [answer if hasattr(answer, "__code__") else type(answer).__call__]
    return [part for part in map(inspect.unwrap, filter(callable, parts)) if hasattr(part, "__code__")]


def fingerprint(answer):
    """The same for the same code, wherever it stands and whatever comments it has."""

    def of(code):
        constants = [of(c) if inspect.iscode(c) else repr(c) for c in code.co_consts]
        return code.co_code, code.co_names, tuple(constants)

    return tuple(of(part.__code__) for part in functions_of(answer)) or repr(answer)


def frames_of(error, answer):
    """Those frames of an error that lie in the cell of the answer."""
    files = {part.__code__.co_filename for part in functions_of(answer)}
    return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]


def unwritten(error, answer):
    """What is left to write, if the error is that of an unfinished stub. (PyTorch raises NotImplementedError, too.)"""
    own, last = frames_of(error, answer), traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, NotImplementedError) or str(error) or not own or own[-1] != last:
        return ""
    return f"{last.name} of the class above" if isinstance(answer, type) else "your answer into the cell above"


def explained(error, answer):
    """An error as a sentence: type, message and, where it arose in the answer, the line."""
    text, own = f"{type(error).__name__}: {str(error).strip() or 'no message'}".rstrip("."), frames_of(error, answer)
    if not own:
        return f"{text} (when the check looked at what it returned). "
    line = linecache.getline(own[-1].filename, own[-1].lineno).strip()
    return f"{text}, in line {own[-1].lineno} of the answer's cell:\n    {line}\n"


def reduced(full, small):
    """`full`, or `small` where the environment has NANO_DB_REDUCED set: for tests that must be fast."""
    return small if os.environ.get("NANO_DB_REDUCED") else full
