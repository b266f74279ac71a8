import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from nano_db.laboratory.exercises import check, main, reduced


def unfinished():
    raise NotImplementedError


@pytest.mark.parametrize(
    "passed, line",
    [
        (lambda: True, "1.2: right"),
        (lambda: torch.tensor(True), "1.2: right"),
        (lambda: False, "1.2: not yet. Mind the sign."),
        (lambda: None, "1.2: not yet. Mind the sign."),
        (unfinished, "1.2: not yet. Mind the sign. (NotImplementedError)"),
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


def test_a_notebook_is_executed_in_place_and_left_alone_where_a_cell_raises(tmp_path, cli):
    path = tmp_path / "n.ipynb"
    nbformat.write(
        new_notebook(cells=[new_code_cell("import time\nfor i in range(3): print(i); time.sleep(0.3)")]), path
    )
    assert cli(path, main=main)[0] == 0
    (cell,) = nbformat.read(path, as_version=4).cells
    assert [output.text for output in cell.outputs] == ["0\n1\n2\n"] and "execution" not in cell.metadata

    nbformat.write(new_notebook(cells=[new_code_cell("print(1)"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    code, _, errors = cli(path, main=main)
    assert code == 2 and "ZeroDivisionError" in errors and "Traceback" not in errors
    assert path.read_bytes() == before


def test_a_file_that_is_no_notebook_is_named(tmp_path, cli):
    (tmp_path / "n.ipynb").write_text("no JSON")
    for name in ("n.ipynb", "missing.ipynb"):
        code, _, errors = cli(tmp_path / name, main=main)
        assert code == 2 and name in errors and "Traceback" not in errors
