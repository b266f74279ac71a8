"""The course is code, too: every notebook runs from a clean kernel, and every exercise has a solution that its own
check accepts.

An exercise is three code cells of one metadata["exercise"]: a stub, tagged `exercise`; a check, tagged `check`, right
after it; and, at the end of the notebook, a `solution`, which defines the same names and checks them again. So a run
from top to bottom must print "to do" at the check, without the hint, and "right" at the solution.
"""

import ast
import inspect
import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nano_db.block import DiffusionBlock

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?:^|[\s\"'(=])(?:/\w[\w.+-]*/[\w.+-]|[A-Za-z]:\\)", re.MULTILINE)

MODULES = [f"nano_db.{path.stem}" for path in sorted((ROOT / "nano_db").glob("[a-z]*.py"))]  # the method's room

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def execute(notebook, folder):
    """Run all cells of a notebook in a fresh kernel that works in `folder`; the node is changed in place."""
    return NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, timeout=600).execute()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    """{exercise: (position, cell)} of the code cells with this tag."""
    found = {}
    for i, cell in enumerate(notebook.cells):
        if tag in cell.metadata.get("tags", []):
            name = cell.metadata.get("exercise")
            assert name and cell.cell_type == "code", f"a cell tagged {tag} names no exercise"
            assert name not in found, f"{name} has two cells tagged {tag}"
            found[name] = (i, cell)
    return found


def text_of(cell):
    """What the cell printed and returned."""
    printed = [output.get("text", "") for output in cell.outputs]
    return "".join([*printed, *(output.get("data", {}).get("text/plain", "") for output in cell.outputs)])


def faults_of_exercises(notebook):
    """What is wrong with the exercises of an executed notebook: a list of sentences, empty if all is well."""
    stubs, checks, solutions = (tagged(notebook, tag) for tag in ("exercise", "check", "solution"))
    faults = []
    if not 3 <= len(stubs) <= 5:
        faults.append(f"{len(stubs)} exercises")
    if not stubs.keys() == checks.keys() == solutions.keys():
        return [*faults, f"stubs {[*stubs]}, checks {[*checks]}, solutions {[*solutions]}"]
    for name, (position, _) in stubs.items():
        if checks[name][0] != position + 1:
            faults.append(f"{name}: the check does not follow the stub")
        if not text_of(checks[name][1]).startswith(f"{name}: to do. "):
            faults.append(f"{name}: the stub does not raise NotImplementedError: {text_of(checks[name][1])!r}")
        if not checks[name][1].metadata.get("jupyter", {}).get("source_hidden"):
            faults.append(f"{name}: the check, which holds the hint, is not collapsed")
        if solutions[name][0] < max(position for position, _ in checks.values()):
            faults.append(f"{name}: the solution stands before the last check")
        if not solutions[name][1].metadata.get("jupyter", {}).get("source_hidden"):
            faults.append(f"{name}: the solution is not collapsed")
        if text_of(solutions[name][1]) != f"{name}: right\n":
            faults.append(f"{name}: the solution is not right: {text_of(solutions[name][1])!r}")
    return faults


def shown_sources(cell):
    """The source, as it is today, of everything of nano_db that a cell prints by inspect.getsource(name)."""
    names = re.findall(r"getsource\(([\w.]+)\)", cell.source) if cell.cell_type == "code" else []
    for name in names:
        owner, *rest = name.split(".")
        found = [module for module in map(import_module, MODULES) if hasattr(module, owner)]
        assert found, f"{name} is nowhere in nano_db"
        yield inspect.getsource(attrgetter(".".join([owner, *rest]))(found[0])).strip()


def stale_sources(notebook):
    """Ids of the cells that show code of nano_db otherwise than it stands today."""
    return [cell.id for cell in notebook.cells if any(text_of(cell).count(code) != 1 for code in shown_sources(cell))]


def definitions(source):
    """Names of the functions and classes that a piece of Python defines at its top level."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds)}


def source_of(notebook):
    """All code cells as one piece of Python; lines for IPython alone (%magic, !shell) left out."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


READS = {  # the last of the committed results that a notebook reads, where they are being measured anew
    "08_looped_without_bptt": "looped-shallow-s0.json",
    "09_what_does_it_buy": "dit-plateau-ensemble-s0.json",
}


def run_among(path):
    """Where a notebook is run: all but the first among the slow tests."""
    marks = [pytest.mark.slow] if path.stem >= "02" else []
    if path.stem in READS and not (ROOT / "results" / "laptop" / READS[path.stem]).exists():
        marks.append(pytest.mark.skip(reason=f"it reads results/laptop/{READS[path.stem]}, which is not there yet"))
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [run_among(path) for path in PATHS])
def test_it_runs_in_reduced_size_and_its_exercises_hold(path, monkeypatch):
    monkeypatch.setenv("NANO_DB_REDUCED", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert faults_of_exercises(execute(nbformat.read(path, as_version=4), path.parent)) == []


@each_notebook
def test_it_is_committed_executed_small_and_without_traces_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_000_000
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert faults_of_exercises(notebook) == []
    assert notebook.metadata.kernelspec.name == "python3"
    assert sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown") <= 2800
    for cell in notebook.cells:
        assert "execution" not in cell.metadata, f"{cell.id} keeps the time at which it ran"
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr", f"{cell.id}: {output}"
        assert cell.cell_type != "code" or not ABSOLUTE_PATH.search(text_of(cell)), f"{cell.id} shows a path"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert stale_sources(notebook) == [], "these cells show code that has changed since: run the notebook again"


@each_notebook
def test_it_redefines_nothing_of_nano_db(path):
    library = set().union(*(definitions(file.read_text(encoding="utf-8")) for file in (ROOT / "nano_db").rglob("*.py")))
    assert "euler_walk" in library
    assert definitions(source_of(nbformat.read(path, as_version=4))) & library == set()


def executed(stub, check, solution):
    """A notebook of three exercises, run: two that are fine, and the given one."""
    exercises = dict.fromkeys(("1.1", "1.2"), ("def answer():\n    raise NotImplementedError", "answer()", "True", ""))
    exercises["1.3"] = (stub, check, check, solution)
    setup = 'import sys; sys.path.insert(0, ".."); from experiments.exercises import check'
    cells, solutions = [new_code_cell(setup)], []
    for name, (stub, before, after, answer) in exercises.items():
        before, after = (f'\ncheck("{name}", lambda: {passed}, "Think.")' for passed in (before, after))
        cells.append(new_code_cell(stub, metadata={"tags": ["exercise"], "exercise": name}))
        hidden = {"exercise": name, "jupyter": {"source_hidden": True}}
        cells.append(new_code_cell(before, metadata=hidden | {"tags": ["check"]}))
        solutions.append(new_code_cell(answer + after, metadata=hidden | {"tags": ["solution"]}))
    return execute(new_notebook(cells=[*cells, *solutions]), ROOT / "notebooks")


def test_faults_of_exercises_are_found():
    stub, four = "def number():\n    raise NotImplementedError", "def number():\n    return 4"
    assert faults_of_exercises(executed(stub, "number() == 4", four)) == []
    wrong = faults_of_exercises(executed(stub, "number() == 5", four))
    assert len(wrong) == 1 and "1.3: the solution is not right" in wrong[0]
    easy = faults_of_exercises(executed("answer = None", "True", "answer = 4"))
    assert len(easy) == 1 and "1.3: the stub does not raise" in easy[0]


def test_code_that_has_changed_since_it_was_shown_is_found():
    load = 'import inspect, sys; sys.path.insert(0, ".."); from nano_db.block import DiffusionBlock\n'
    show = "print(inspect.getsource(DiffusionBlock.loss))"
    today = inspect.getsource(DiffusionBlock.loss)
    texts = {"fresh": today, "stale": today.replace("torch.randn_like", "torch.rand_like"), "empty": ""}
    cells = [
        new_code_cell(show, id=name, outputs=[new_output("stream", name="stdout", text=text)])
        for name, text in texts.items()
    ]
    assert today != texts["stale"]
    assert stale_sources(new_notebook(cells=[*cells, new_code_cell("print(1)", id="other")])) == ["stale", "empty"]
    assert stale_sources(execute(new_notebook(cells=[new_code_cell(load + show)]), ROOT / "notebooks")) == []


def test_notebook_3_shows_the_training_loop_of_the_script():
    def loop(source):
        lines = [line.split("  # ")[0].strip() for line in source.splitlines()]
        return lines[lines.index("for _ in run.rounds():") : lines.index("del block, optimizer, loss") + 1]

    (path,) = (path for path in PATHS if path.stem.startswith("03_"))
    shown, script = (
        loop(source_of(nbformat.read(path, as_version=4))),
        loop((ROOT / "train_gpt.py").read_text(encoding="utf-8")),
    )
    left_out = {"with run.autocast:", "run.average_gradients(block)"}  # as the notebook says, and the arguments below
    without = [line.replace(", text, partition)", ")") for line in script if line not in left_out]
    assert left_out < {*script} and shown == without


@pytest.mark.parametrize(
    "text, found", [("in /tmp/x.pt", True), ("'C:\\x'", True), ("1/2 and a/b/c, 3 / 4 / 5", False)]
)
def test_absolute_paths_are_seen(text, found):
    assert bool(ABSOLUTE_PATH.search(text)) is found
