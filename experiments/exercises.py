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

    name: the exercise, like "1.2". answer: a function or a class. passed: answer -> whether it is right; an error in
    it means that it is not, and is shown. hints: the idea; then nearly the code, for a second, different attempt.
    otherwise: what later cells use while the answer is not right. An answer is checked in isolation: the random numbers
    it draws and the torch settings it changes do not affect later cells.
    """
    used = otherwise is not NOT_USED
    until = " Until it is right, the notebook uses nano_db's own version." * used
    instead = otherwise if used else None
    right = False
    with apart():
        try:
            right, fault, counts = bool(passed(guarded(answer))), "", True
        except KeyboardInterrupt:
            print(f"{name}: stopped before it was checked.{until}")
            return instead
        except (Exception, SystemExit) as error:
            if missing := unwritten(error, answer):
                print(f"{name}: not answered yet. Write {missing}, and run both cells.{until}")
                return instead
            if type(error) is NameError and not frames_of(error, answer):  # of the check: it needs other cells
                print(f"{name}: not checked. {error}: run the cells above this one first.{until}")
                return instead
            fault = explained(error, answer)
            of_module = isinstance(error, AttributeError) and inspect.ismodule(error.obj)
            counts = not of_module and not isinstance(error, (NameError, SyntaxError))
    if right:
        print(f"{name}: right." + " The cells below use your answer: run them again." * used)
        return answer if used else None
    wrong = WRONG.setdefault(name, set())
    if counts:  # a typo is not an attempt
        wrong.add(fingerprint(answer))
    hint = hints[min(len(wrong), len(hints)) - 1] if wrong else ""
    print(f"{name}: not yet. {fault}{hint}{until}")
    return instead


@contextmanager
def apart():
    """Random state, default dtype and device, and whether gradients are recorded are afterwards what they were."""
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:  # a device that has been set slows every call
                torch.set_default_device(device)
            torch.set_grad_enabled(gradients)


def guarded(answer):
    """The function `answer`, which now raises ValueError if it returns NaN or changes a tensor that it was given.

    NaN is neither above nor below the tolerance of a check; and later cells need their tensors as they were.
    """
    if isinstance(answer, type):
        return answer

    @functools.wraps(answer)
    def call(*inputs, **named):
        given = [x for x in (*inputs, *named.values()) if torch.is_tensor(x)]
        before = [x.clone() for x in given]
        found = answer(*inputs, **named)
        if not all(map(torch.equal, given, before)):
            raise ValueError("it changes one of its inputs in place; later cells need them as they were")
        if any(number.isnan().any() for number in map(torch.as_tensor, numbers_of(found))):
            raise ValueError("it returns nan, which is not a number")
        return found

    return call


def numbers_of(found):
    """The numbers and tensors of numbers in what an answer returned: alone, or in a list or tuple."""
    parts = found if isinstance(found, (list, tuple)) else [found]
    return [part for part in parts if isinstance(part, (int, float, torch.Tensor))]


def close(found, wanted, atol=1e-6, rtol=0.0):
    """Whether an answer has the shape of what is wanted and, up to a tolerance, its numbers. Any dtype will do.

    A single number may also be a tensor of one element.
    """
    found, wanted = (torch.as_tensor(x).detach().double() for x in (found, wanted))
    if found.numel() == wanted.numel() == 1:
        found, wanted = found.view(()), wanted.view(())
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=atol, rtol=rtol)


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
    """The same for the same code, wherever it stands and whatever comments and docstring it has."""

    def of(code, docstring=None):
        constants = [of(c) if inspect.iscode(c) else repr(c) for c in code.co_consts if c not in (None, docstring)]
        return code.co_code, code.co_names, tuple(constants)

    return tuple(of(part.__code__, part.__doc__) for part in functions_of(answer)) or repr(answer)


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
        return f"{text} (when the check called the answer, or looked at what it returned). "
    line = linecache.getline(own[-1].filename, own[-1].lineno).strip()
    return f"{text}, in line {own[-1].lineno} of the answer's cell:\n    {line}\n"


def reduced(full, small):
    """`full`, or `small` where the environment has NANO_DB_REDUCED set: for tests that must be fast."""
    return small if os.environ.get("NANO_DB_REDUCED") else full
