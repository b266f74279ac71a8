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
METHOD, TRAINER, EXPERIMENTS = "nano_db", "nano_db.trainer", "experiments"
EXPERIMENTS_FOLDERS = ("experiments", "experiments/gpu", "experiments/neighbours")


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


NAMES = [script.__name__ for script in SCRIPTS]


def test_imports_point_one_way():
    """experiments -> scripts -> trainer -> method. Data knows only the errors."""
    assert sorted(path.stem for path in ROOT.glob("train_*.py")) == sorted(NAMES)
    assert forbidden("nano_db", TRAINER, EXPERIMENTS, "data", *NAMES) == []
    assert forbidden("nano_db/trainer", EXPERIMENTS, "data", *NAMES) == []
    assert forbidden(".", EXPERIMENTS, *NAMES) == []  # the scripts
    assert forbidden("data", METHOD, EXPERIMENTS, *NAMES, allowed=["nano_db.errors"]) == []


def test_there_is_one_folder_in_the_package():
    assert {path.parent for path in (ROOT / "nano_db").rglob("*.py")} == {ROOT / "nano_db", ROOT / "nano_db/trainer"}
    folders = {path.parent for path in (ROOT / "experiments").rglob("*.py")}
    assert folders == {ROOT / folder for folder in EXPERIMENTS_FOLDERS}


def functions(path):
    """(name, lines, node) of each function that a file defines, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1, node


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_read_from_top_to_bottom(name):
    """Its functions are short, stand at the level of the module or of a class, and are handed what they need."""
    path = ROOT / f"{name}.py"
    found = {function: node for function, _, node in functions(path)}
    assert {"prepare", "build", "batch", "sample", "evaluate", "main"} <= found.keys()
    assert max(lines for _, lines, _ in functions(path)) <= 40
    assert not [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Lambda)]
    for function, _, node in functions(path):
        inner = [other for other in ast.walk(node) if isinstance(other, ast.FunctionDef) and other is not node]
        assert not inner, f"{function} has a function inside"
    assert "functools" not in imports(path) and "functools.partial" not in imports(path)


def test_nothing_is_patched_and_no_object_changes_its_class():
    for folder in (".", "nano_db", "nano_db/trainer", *EXPERIMENTS_FOLDERS, "data"):
        for path in (ROOT / folder).glob("*.py"):
            assert not any(inside(name, "unittest") for name in imports(path)), path
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            aliases = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
            modules = {alias.asname or alias.name for alias in aliases}
            for node in nodes:
                for target in getattr(node, "targets", [getattr(node, "target", None)]):
                    if isinstance(target, ast.Attribute):
                        assert target.attr != "__class__" and ast.unparse(target.value) not in modules, path


def test_the_method_knows_no_flags():
    for path in (ROOT / "nano_db").glob("*.py"):
        strings = [
            n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)
        ]
        assert not [text for text in strings if isinstance(text, str) and re.search(r"(^|\s)--[a-z]", text)], path


@pytest.mark.parametrize("line", ["import nano_db.trainer.run", "from nano_db.trainer import run"])
def test_these_tests_can_tell(tmp_path, monkeypatch, line):
    monkeypatch.setattr("test_rooms.ROOT", tmp_path)
    (tmp_path / "file.py").write_text(f"import nano_db\ndef f():\n    {line}\n")
    assert ("file.py", "nano_db.trainer.run") in forbidden(".", TRAINER) and not forbidden(".", EXPERIMENTS)


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
def test_a_script_has_at_most_35_flags_each_under_a_heading(cli, script):
    code, out, _ = cli("--help", main=script.main)
    flags = headings(out)
    assert code == 0 and flags.pop("options") == ["--help"]
    assert list(flags) == ["method", "network", "training", "output"] and all(flags.values())
    total = [flag for group in flags.values() for flag in group]
    assert len(total) == len(set(total)) <= 35
    assert {"--baseline", "--steps", "--out", "--device", "--preset"} <= {*total}
