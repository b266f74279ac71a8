import pytest
import torch

from nano_db.laboratory.exercises import check, reduced


def unfinished():
    raise NotImplementedError


@pytest.mark.parametrize(
    "passed, line",
    [
        (lambda: True, "1.2: right"),
        (lambda: torch.tensor(True), "1.2: right"),
        (lambda: False, "1.2: not yet. Mind the sign."),
        (lambda: None, "1.2: not yet. Mind the sign."),
        (unfinished, "1.2: to do. Write your answer into the cell above, and run both again."),
        (lambda: 1 / 0, "1.2: not yet. Mind the sign. (ZeroDivisionError)"),
        (lambda: torch.tensor([True, True]), "1.2: not yet. Mind the sign. (RuntimeError)"),  # not one answer
    ],
)
def test_a_check_prints_one_line_and_never_raises(capsys, passed, line):
    check("1.2", passed, "Mind the sign.")
    assert capsys.readouterr().out == line + "\n"


def test_the_environment_reduces(monkeypatch):
    monkeypatch.delenv("NANO_DB_REDUCED", raising=False)
    assert reduced(2000, 50) == 2000
    monkeypatch.setenv("NANO_DB_REDUCED", "1")
    assert reduced(2000, 50) == 50
