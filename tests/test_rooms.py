"""The house: who may import whom, and how many flags a script has."""

import ast
import re

import pytest
from conftest import ROOT

import train_dit
import train_gpt
import train_looped
import train_mdm
import train_vit

SCRIPTS = [train_dit, train_gpt, train_looped, train_mdm, train_vit]
METHOD, MACHINERY, LABORATORY = "nano_db", "nano_db.machinery", "nano_db.laboratory"


def imports(path):
    """Full names of all that a file imports, wherever in it: "nano_db.stack", "nano_db.stack.Stack", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import: say the whole name"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def inside(name, package):
    return name == package or name.startswith(package + ".")


def forbidden(folder, *packages, allowed=()):
    """(file, import) of the files that stand in the folder itself, for imports from these packages."""
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    return [
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in imports(path)
        if any(inside(name, package) for package in packages) and not any(inside(name, a) for a in allowed)
    ]


def test_the_method_imports_neither_machinery_nor_laboratory():
    assert forbidden("nano_db", MACHINERY, LABORATORY, "data") == []


def test_the_machinery_does_not_import_the_laboratory():
    assert forbidden("nano_db/machinery", LABORATORY, "data") == []


def test_data_imports_nothing_of_nano_db_but_its_errors():
    assert forbidden("data", METHOD, allowed=["nano_db.errors"]) == []


def test_scripts_are_imported_by_tests_and_notebooks_alone():
    scripts = [script.__name__ for script in SCRIPTS]
    assert sorted(path.stem for path in ROOT.glob("train_*.py")) == sorted(scripts)
    for folder in (".", "data", "nano_db", "nano_db/machinery", "nano_db/laboratory", "nano_db/laboratory/neighbours"):
        assert forbidden(folder, *scripts) == []


def test_there_is_no_fourth_room():
    rooms = {ROOT / "nano_db", ROOT / "nano_db/machinery", ROOT / "nano_db/laboratory"}
    rooms.add(ROOT / "nano_db/laboratory/neighbours")  # which the laboratory rents out to other methods
    assert {path.parent for path in (ROOT / "nano_db").rglob("*.py")} == rooms


@pytest.mark.parametrize("line", ["import nano_db.machinery.run", "from nano_db.machinery import run"])
def test_these_tests_can_tell(tmp_path, monkeypatch, line):
    monkeypatch.setattr("test_rooms.ROOT", tmp_path)
    (tmp_path / "file.py").write_text(f"import nano_db\ndef f():\n    {line}\n")
    assert ("file.py", "nano_db.machinery.run") in forbidden(".", MACHINERY) and not forbidden(".", LABORATORY)


def headings(text):
    """{heading: [flags]} of a --help."""
    found, flags = {}, None
    for line in text.splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            flags = found.setdefault(heading[1], [])
        elif flags is not None and (flag := re.match(r"  (?:-\w, )?(--[\w-]+)", line)):
            flags.append(flag[1])
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_has_at_most_38_flags_each_under_a_heading(cli, script):
    code, out, _ = cli("--help", main=script.main)
    flags = headings(out)
    assert code == 0 and flags.pop("options") == ["--help"]
    assert list(flags) == ["method", "network", "training", "output"] and all(flags.values())
    total = [flag for group in flags.values() for flag in group]
    assert len(total) == len(set(total)) <= 38
    assert {"--baseline", "--steps", "--out", "--device", "--preset"} <= {*total}
