"""`pip install -e .`: what it installs is what there is. (That it works, .ci/run tries: it needs the network.)"""

import re
import sys

import pytest
from conftest import ROOT

import nano_db

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_and_script_is_installed():
    folders = {path.parent for name in ("nano_db", "data", "experiments") for path in (ROOT / name).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == {path.stem for path in ROOT.glob("train_*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_what_is_installed_with_it_is_what_the_readme_and_the_requirements_say():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = {re.match(r"\w+", line)[0] for line in lines if line and not line.startswith("#")}
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]
    (said,) = re.findall(r"^Packages: (.*?)\.(?: |$)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name.split()[0].lower() for name in said.split(", ")} == needed
    assert PROJECT["project"]["version"] == nano_db.__version__ and sys.version_info >= (3, 10)
