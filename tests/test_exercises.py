import functools
import math
import sys

import pytest
import torch

from experiments.exercises import WRONG, check, close, reduced

HINTS = "Mind the sign.", "return -x."


@pytest.fixture(autouse=True)
def no_attempts_yet():
    WRONG.clear()


def is_minus(answer):
    return answer(2) == -2


def unfinished(x):
    raise NotImplementedError


def right(x):
    return -x


def wrong(x):
    return x


def wrong_again(x):
    return 2 * x


def broken(x):
    y = x + 1
    return y / 0  # here


@pytest.mark.parametrize(
    "answer, line",
    [
        (right, "1.2: right.\n"),
        (lambda x: torch.tensor(-2), "1.2: right.\n"),
        (wrong, "1.2: not yet. Mind the sign."),
        (unfinished, "1.2: not answered yet. Write your answer into the cell above, and run both cells."),
        (lambda x: torch.tensor([1, 2]), "1.2: not yet. RuntimeError: Boolean value of Tensor"),  # not one answer
        (lambda x: torch.tensor([1]).softmax(0), "1.2: not yet. NotImplementedError: "),  # PyTorch's, not the stub's
        (lambda x: sys.exit("done"), "1.2: not yet. SystemExit: done"),
        (functools.partial(wrong), "1.2: not yet. Mind the sign."),
        (max, "1.2: not yet. TypeError: "),
        (lambda x: None, "1.2: not yet. Mind the sign."),
        (lambda x: math.nan, "1.2: not yet. ValueError: it returns nan"),
        (lambda x: (-2, torch.tensor(math.nan)), "1.2: not yet. ValueError: it returns nan"),
    ],
)
def test_a_check_says_what_is_to_be_said_and_never_raises(capsys, answer, line):
    check("1.2", answer, is_minus, HINTS)
    assert capsys.readouterr().out.startswith(line)


def test_an_error_in_an_answer_is_shown_with_its_line(capsys):
    check("1.2", broken, is_minus, HINTS)
    number = broken.__code__.co_firstlineno + 2
    shown = f"1.2: not yet. ZeroDivisionError: division by zero, in line {number} of the answer's cell:\n"
    assert capsys.readouterr().out == f"{shown}    return y / 0  # here\nMind the sign.\n"
    exec(compile("def adds(answer): return answer(2) + 1", "the check's cell", "exec"), elsewhere := {})
    check("1.3", lambda x: "x", elsewhere["adds"], HINTS)
    assert "TypeError: can only concatenate str" in (out := capsys.readouterr().out) and "what it returned" in out


def test_a_check_that_lacks_its_cells_does_not_blame_the_answer(capsys):
    exec(compile("def uses(answer): return mixture(answer)", "the check's cell", "exec"), elsewhere := {})
    for answer in (right, unfinished):
        assert check("1.2", answer, elsewhere["uses"], HINTS, otherwise=abs) is abs
        said = capsys.readouterr().out
        assert said.startswith("1.2: not checked. name 'mixture' is not defined: run the cells above this one first.")
    check("1.2", wrong, is_minus, HINTS)
    assert HINTS[0] in capsys.readouterr().out, "that was no attempt"


def test_an_answer_may_not_change_what_it_is_given(capsys):
    def in_place(x):
        x *= -1
        return x

    check("1.2", in_place, lambda answer: close(answer(torch.tensor(2.0)), -2.0))
    assert "ValueError: it changes one of its inputs in place" in capsys.readouterr().out
    check("1.2", lambda x: x * -1, lambda answer: close(answer(torch.tensor(2.0)), -2.0))
    assert "right" in capsys.readouterr().out


def test_close_asks_for_the_shape_and_not_for_the_dtype():
    assert close(torch.ones(3), torch.ones(3, dtype=torch.float64)) and close([1.0, 1.0], torch.ones(2))
    assert close(1, torch.tensor([1.0])) and close(1.05, 1.0, atol=0.1) and close(110.0, 100.0, rtol=0.1)
    assert not close(torch.ones(1, 3), torch.ones(3)) and not close(1.2, 1.0, atol=0.1) and not close(math.nan, 1.0)


def test_the_second_hint_is_for_a_second_different_attempt(capsys):
    def hint(answer, name="1.2"):
        check(name, answer, is_minus, HINTS)
        return capsys.readouterr().out.strip().rpartition("not yet. ")[2]

    assert [hint(wrong), hint(wrong), hint(unfinished)[:8]] == [HINTS[0], HINTS[0], "1.2: not"]
    exec(compile("\n\n\ndef wrong(x):  # a comment\n    return x", "another cell", "exec"), same := {})
    assert hint(same["wrong"]) == HINTS[0], "the same code elsewhere is no other attempt"
    exec(compile("def wrong(x):\n    'A docstring.'\n    return x", "a third cell", "exec"), same)
    assert hint(same["wrong"]) == HINTS[0], "nor is another docstring"
    assert hint(lambda x: math.prood(x)).endswith(HINTS[0]), "nor is a misspelt function"
    assert hint(lambda x: minus(x)).endswith(HINTS[0]), "nor is a name that is not there"  # noqa: F821
    assert hint(wrong_again) == hint(wrong) == HINTS[1]
    assert hint(wrong_again, "1.3") == HINTS[0], "another exercise"
    typo = hint(lambda x: minus(x), "1.4")  # noqa: F821
    assert typo.startswith("NameError") and not any(hint in typo for hint in HINTS), "no hint before an attempt"


def test_decorated_answers_are_seen_through(capsys):
    for name, body in (("1.2", wrong), ("1.2", wrong_again), ("1.3", functools.partial(wrong)), ("1.3", abs)):
        check(name, torch.no_grad()(body) if name == "1.2" else body, is_minus, HINTS)
    assert capsys.readouterr().out.count(HINTS[1]) == 2
    check("1.4", torch.no_grad()(broken), is_minus, HINTS)
    assert "return y / 0  # here" in capsys.readouterr().out


def test_the_notebook_continues_with_a_right_answer_and_else_with_the_librarys(capsys):
    assert check("1.2", right, is_minus, HINTS, otherwise=abs) is right
    assert "The cells below use your answer" in capsys.readouterr().out
    assert check("1.2", wrong, is_minus, HINTS, otherwise=abs) is abs
    assert "use your answer" not in (out := capsys.readouterr().out) and "uses nano_db's own" in out
    assert check("1.2", unfinished, is_minus, HINTS, otherwise=None) is None
    assert "uses nano_db's own" in capsys.readouterr().out
    assert check("1.2", right, is_minus, HINTS) is None, "nothing is shown below the cell"


def test_an_answer_may_be_a_class(capsys):
    class Counter:
        def __init__(self, start):
            self.at = start + self.missing

    class Other:
        def __init__(self, start):
            self.at = start

    def counts(answer):
        return answer(3).at == 4

    for answer in (Counter, Counter, Other):
        check("2.3", answer, counts, HINTS)
    out = capsys.readouterr().out
    assert out.count("AttributeError: 'Counter' object has no attribute 'missing'") == out.count(HINTS[0]) == 2
    assert "self.at = start + self.missing" in out and out.count(HINTS[1]) == 1


def test_an_unfinished_class_is_told_what_is_missing(capsys):
    class Half:
        def __init__(self):
            self.edges = [1, 2]

        def route(self, sigma):
            raise NotImplementedError

    check("2.3", Half, lambda answer: answer().route(1.0), HINTS)
    assert capsys.readouterr().out.startswith("2.3: not answered yet. Write route of the class above")


def test_a_check_that_is_stopped_leaves_what_the_notebook_needs(capsys):
    def stopped(answer):
        raise KeyboardInterrupt

    assert check("1.2", right, stopped, HINTS, otherwise=abs) is abs
    assert capsys.readouterr().out.startswith("1.2: stopped")


def test_what_an_answer_sets_in_torch_is_set_back():
    def careless(x):
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        return -x

    check("1.2", careless, is_minus)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.get_default_device().type == "cpu"


def test_random_numbers_are_drawn_apart():
    drawn = []

    def draws(answer):
        torch.manual_seed(99)
        drawn.append(float(torch.rand(())))
        return True

    torch.manual_seed(5)
    check("1.2", right, draws)
    after = torch.rand(())
    torch.manual_seed(5)
    assert after == torch.rand(()) and drawn


def test_the_environment_reduces(monkeypatch):
    monkeypatch.delenv("NANO_DB_REDUCED", raising=False)
    assert reduced(2000, 50) == 2000
    monkeypatch.setenv("NANO_DB_REDUCED", "1")
    assert reduced(2000, 50) == 50
