"""The course is code, too: every notebook runs from a clean kernel, and every exercise has a solution that its own
check accepts.

An exercise is three code cells of one metadata["exercise"]: a stub, tagged `exercise`; a check, tagged `check`, right
after it; and, at the end of the notebook, a `solution`, which defines the answer under another name and checks it, too.
So a run from top to bottom must print "not answered yet" at the check, without the hint, and "right" at the solution.
Cells tagged `results` show what is committed in results/, and train nothing.
"""

import ast
import inspect
import io
import re
import symtable
import sys
from contextlib import redirect_stdout
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nano_db.block import DiffusionBlock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import student_copies  # noqa: E402
from renew_results import only_results  # noqa: E402
from slips import SLIPS  # noqa: E402

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
    """{exercise: (position, cell)} of the code cells with this tag. (Other cells may belong to the solutions, too.)"""
    found = {}
    for i, cell in enumerate(notebook.cells):
        if tag in cell.metadata.get("tags", []) and (name := cell.metadata.get("exercise")):
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
    if not stubs.keys() == checks.keys() == solutions.keys():
        return [*faults, f"stubs {[*stubs]}, checks {[*checks]}, solutions {[*solutions]}"]
    for name, (position, _) in stubs.items():
        if checks[name][0] != position + 1:
            faults.append(f"{name}: the check does not follow the stub")
        if not text_of(checks[name][1]).startswith(f"{name}: not answered yet. "):
            faults.append(f"{name}: the stub does not raise NotImplementedError: {text_of(checks[name][1])!r}")
        if text_of(solutions[name][1]) != f"solution {name}: right.\n":
            faults.append(f"{name}: the solution is not right: {text_of(solutions[name][1])!r}")
        if definitions(solutions[name][1].source) & definitions(stubs[name][1].source):
            faults.append(f"{name}: the solution overwrites the answer, and the check would say right to an empty stub")
    hidden = {"jupyter": {"source_hidden": True}, "cellView": "form", "transient": {"remove_source": True}}
    for cell in notebook.cells:  # in JupyterLab, on Colab, and in an export to HTML
        kept_folded = {"check", "solution"} & {*cell.metadata.get("tags", [])} and not cell.source.startswith("## ")
        if kept_folded and any(cell.metadata.get(key) != value for key, value in hidden.items()):
            faults.append(f"{cell.metadata.get('exercise')}: the {cell.metadata.tags[0]} is not hidden")
    return faults


def answered(notebook):
    """The notebook as it is after a student has given every solution as an answer, and run nothing yet."""
    stubs, solutions = tagged(notebook, "exercise"), tagged(notebook, "solution")
    for name, (_, cell) in solutions.items():
        answer = cell.source[: cell.source.rindex("\ncheck(")].rstrip()
        stubs[name][1].source = re.sub(r"\bsolution_", "answer_", re.sub(r"\bSolution(?=\d)", "Answer", answer))
    return notebook


def with_slips(notebook):
    """The notebook with further cells after each check, which try it on wrong answers."""
    cells, solutions = [], tagged(notebook, "solution")
    for cell in notebook.cells:
        cells.append(cell)
        if "check" not in cell.metadata.get("tags", []):
            continue
        name = cell.metadata.exercise
        right, call = solutions[name][1].source.rsplit("\ncheck(", 1)
        for old, new in SLIPS[name]:
            assert old in right, f"{name}: {old!r} is not in the solution"
            source = f"{right.replace(old, new)}\ncheck({call}"
            cells.append(new_code_cell(source, metadata={"slip": f"{name}: {new}"}))
    notebook.cells = cells
    return notebook


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
    """All code cells as one piece of Python; without lines that only IPython knows (%magic, !shell)."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def notebooks(paths, slow=True):
    """Notebooks as parameters. Where they are run, they are slow (but for one)."""
    return [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if slow and not path.stem.startswith("01") else ())
        for path in paths
    ]


@pytest.mark.parametrize("path", notebooks(PATHS))
def test_it_runs_in_reduced_size_and_its_exercises_hold(path, monkeypatch):
    monkeypatch.setenv("NANO_DB_REDUCED", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert faults_of_exercises(execute(nbformat.read(path, as_version=4), path.parent)) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(PATHS[1:], slow=False))
def test_a_students_copy_with_right_answers_runs_to_its_end_and_uses_them(path, monkeypatch):
    """Wrong answers are tried in the same run: see slips.py."""
    monkeypatch.setenv("NANO_DB_REDUCED", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = student_copies.without_solutions(with_slips(answered(nbformat.read(path, as_version=4))))
    execute(notebook, path.parent)
    said = [text_of(cell) for cell in code_cells(notebook) if "slip" in cell.metadata]
    assert [text for text in said if ": not yet. " not in text] == []
    assert [text for text in said if "NameError" in text or "RuntimeError" in text] == [], "not refused for the slip"
    used = 0
    for name, (_, cell) in tagged(notebook, "check").items():
        uses = "otherwise=" in cell.source
        assert text_of(cell) == f"{name}: right." + " The cells below use your answer: run them again." * uses + "\n"
        used += uses
    assert used or path.stem.startswith("09"), "no answer is used"  # notebook 9 reads results


@each_notebook
def test_its_solutions_stand_last_so_that_a_copy_without_them_runs_to_its_end(path):
    """The whole notebook is run above; a student's copy is its beginning."""
    whole = nbformat.read(path, as_version=4)
    ids, copied = [c.id for c in whole.cells], [c.id for c in student_copies.without_solutions(whole).cells]
    assert copied == ids[: len(copied)] and (len(copied) < len(ids) or path == PATHS[0])


def test_the_copies_for_students_have_no_solutions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["student_copies.py", "--out", str(tmp_path / "students")])
    student_copies.main()
    copies = sorted((tmp_path / "students").glob("*.ipynb"))
    assert [copy.name for copy in copies] == [path.name for path in PATHS]
    out = capsys.readouterr().out
    assert f"{len(PATHS)} notebooks without solutions" in out and "move the folder" in out
    for path, copy in zip(PATHS, copies, strict=True):
        notebook, text = nbformat.read(copy, as_version=4), copy.read_text(encoding="utf-8")
        assert (
            "olution_" not in text and "## Solutions" not in text and not any(c.outputs for c in code_cells(notebook))
        )
        before = nbformat.read(path, as_version=4)
        assert tagged(notebook, "check").keys() == tagged(before, "check").keys() == tagged(before, "solution").keys()


@pytest.mark.parametrize("out", [".", "notebooks", "notebooks/README.md", "tests", "docs"])
def test_copies_for_students_overwrite_nothing(out, monkeypatch, capsys):
    out = ROOT / out
    monkeypatch.setattr(sys, "argv", ["student_copies.py", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        student_copies.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "name a folder that is new or empty" in err and err.count("\n") == 1


def test_copies_that_may_hold_answers_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["student_copies.py", "--out", str(tmp_path)])
    student_copies.main()
    copy = tmp_path / PATHS[1].name
    copy.write_text("answers", encoding="utf-8")
    with pytest.raises(SystemExit):
        student_copies.main()
    assert copy.read_text(encoding="utf-8") == "answers"


SETTING_UP = [  # what is around the notebook, whether it is on Colab, the address; what is said, or None
    ("nothing", False, "OWNER", "in this cell, write the account"),
    ("nothing", True, "OWNER", "in this cell, write the account"),
    ("nothing", False, "somebody", "git clone https://github.com/somebody/nano_db"),
    ("nothing", True, "somebody", None),
    ("a clone from before", True, "somebody", None),
    ("the project", False, "OWNER", None),
]


@pytest.mark.parametrize("around, colab, owner, said", SETTING_UP)
def test_a_notebook_that_stands_alone_says_what_is_missing(around, colab, owner, said, tmp_path, monkeypatch):
    for name in {code_cells(nbformat.read(path, as_version=4))[0].source for path in PATHS}:
        source = name.replace("OWNER/nano_db", f"{owner}/nano_db")
    here, cloned = tmp_path / "notebooks", []
    here.mkdir()
    if around == "the project":
        (tmp_path / "nano_db").mkdir()
        (tmp_path / "nano_db" / "block.py").touch()
    if around == "a clone from before":
        (here / "nano_db" / "notebooks").mkdir(parents=True)

    def run(command, check):
        cloned.append(command[-1])
        (here / "nano_db" / "notebooks").mkdir(parents=True)

    monkeypatch.chdir(here)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    if colab:
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    if said:
        with pytest.raises(Exception, match=said) as missing:
            exec(source, {"__name__": "cell"})
        assert missing.value._render_traceback_() == [str(missing.value)], "one sentence, and no traceback"
    else:
        exec(source, {"__name__": "cell"})
        assert sys.path[0] == ".." and (Path.cwd() == here) is (around == "the project")
    assert cloned == ["https://github.com/somebody/nano_db"] * (around == "nothing" and colab and not said)


def test_all_notebooks_have_the_same_setup():
    assert len({code_cells(nbformat.read(path, as_version=4))[0].source for path in PATHS}) == 1


def test_an_export_to_html_shows_no_solution():
    page, _ = HTMLExporter().from_filename(str(PATHS[1]))
    assert "answer_1_1" in page and "solution_1_1" not in page and "1.1: right." in page


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(PATHS, slow=False))
def test_what_it_prints_of_the_results_is_what_they_are_today(path):
    notebook = nbformat.read(path, as_version=4)
    assert untagged_readers(notebook) == [], "a cell that reads results is tagged so"
    shown = [text_of(cell) for cell in only_results(notebook).cells]
    if len(shown) > 2:  # more than the setup and the imports
        today = [text_of(cell) for cell in execute(only_results(notebook), path.parent).cells]
        assert today == shown, "run notebooks/renew_results.py"


def untagged_readers(notebook):
    """Ids of the cells that use what is read of results/, directly or by a name, and are not tagged `results`."""
    from_records, untagged = {"read_records"}, []
    for cell in code_cells(notebook):
        table = symtable.symtable(cell.source, cell.id, "exec")
        assigned = {name.get_name() for name in table.get_symbols() if name.is_assigned()}
        if (global_names(table) - assigned) & from_records:
            from_records |= assigned
            if "results" not in cell.metadata.get("tags", []):
                untagged.append(cell.id)
        else:
            from_records -= assigned - {"read_records"}  # the imports
    return untagged


def global_names(table):
    """Names that a cell looks up outside of its functions, from wherever in it. table: its symtable."""
    top = table.get_type() == "module"
    own = {name.get_name() for name in table.get_symbols() if name.is_referenced() and (top or name.is_global())}
    return own.union(*map(global_names, table.get_children()))


def test_a_cell_that_uses_records_is_found():
    read, use, other = new_code_cell("found = read_records()"), new_code_cell("print(found)"), new_code_cell("print(1)")
    assert untagged_readers(new_notebook(cells=[read, other])) == [read.id]
    read.metadata.tags = ["results"]
    assert untagged_readers(new_notebook(cells=[read, use, other])) == [use.id]


@pytest.mark.parametrize("path", notebooks(PATHS, slow=False))
def test_it_is_committed_executed_small_and_without_traces_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_000_000
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert faults_of_exercises(notebook) == []
    assert 3 <= len(tagged(notebook, "exercise")) <= 5 or path == PATHS[0]
    assert notebook.metadata.kernelspec.name == "python3"
    assert sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown") <= 3000
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
    """A notebook of one exercise, run, without a kernel."""
    hidden = {"exercise": "1.3", "jupyter": {"source_hidden": True}, "cellView": "form"}
    hidden["transient"] = {"remove_source": True}
    cells = [
        new_code_cell("from experiments.exercises import check"),
        new_code_cell(stub, metadata={"tags": ["exercise"], "exercise": "1.3"}),
        new_code_cell(f'check("1.3", answer, lambda answer: {check})', metadata=hidden | {"tags": ["check"]}),
        new_code_cell(f'{solution}\ncheck("solution 1.3", solution, lambda answer: {check})', metadata=hidden),
    ]
    cells[-1].metadata.tags = ["solution"]
    names = {}
    for cell in cells:
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(cell.source, cell.id, "exec"), names)  # its id: cells are distinguished by their file
        cell.outputs = [new_output("stream", name="stdout", text=printed.getvalue())] * bool(printed.getvalue())
    return new_notebook(cells=cells)


def test_faults_of_exercises_are_found():
    stub, four = "def answer():\n    raise NotImplementedError", "def solution():\n    return 4"
    assert faults_of_exercises(executed(stub, "answer() == 4", four)) == []
    wrong = faults_of_exercises(executed(stub, "answer() == 5", four))
    assert len(wrong) == 1 and "1.3: the solution is not right" in wrong[0]
    easy = faults_of_exercises(executed("def answer():\n    return 4", "answer() == 4", four))
    assert len(easy) == 1 and "1.3: the stub does not raise" in easy[0]
    again = four.replace("solution", "answer") + "\nsolution = answer"
    overwritten = faults_of_exercises(executed(stub, "answer() == 4", again))
    assert len(overwritten) == 1 and "overwrites the answer" in overwritten[0]
    shown = executed(stub, "answer() == 4", four)
    del shown.cells[3].metadata["cellView"]
    assert faults_of_exercises(shown) == ["1.3: the solution is not hidden"]


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
