"""`pip install -e .`: what it installs is what there is. (That it works, .ci/run tries: it needs the network.)"""

import re
import sys

import pytest
from conftest import ROOT
from test_rooms import imports

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_and_script_is_installed():
    folders = {path.parent for name in ("nano_db", "data", "experiments") for path in (ROOT / name).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == {path.stem for path in ROOT.glob("train_*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_what_is_imported_is_required():
    """All packages that are neither Python's own nor ours."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.match(r"\w+", line)[0] for line in lines if line and not line.startswith("#")}
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]
    imported = {name.split(".")[0] for path in ROOT.glob("train_*.py") for name in imports(path)}
    for folder in ("nano_db", "data", "experiments"):
        imported |= {name.split(".")[0] for path in (ROOT / folder).rglob("*.py") for name in imports(path)}
    ours = {"nano_db", "data", "experiments", *PROJECT["tool"]["setuptools"]["py-modules"]}
    others = {"PIL": "pillow", **dict.fromkeys(("nbformat", "IPython", "nbconvert", "ipywidgets"), "jupyter")}
    outside = {others.get(name, name) for name in imported - ours - sys.stdlib_module_names}
    assert outside <= required and {"torch", "numpy", "pillow"} <= outside
