"""What Windows does otherwise, pretended here: no fork, no locks, files held by a virus scanner, other encodings."""

import ast
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_run import make_run, save, take, train

from nano_db.errors import UsageError
from nano_db.trainer import checkpoints
from nano_db.trainer.distributed import join

POSIX = {"os": ("fork", "getuid", "geteuid", "killpg", "uname"), "signal": ("SIGKILL", "SIGSTOP", "SIGHUP")}
COLLECT = f"""
import os, signal, subprocess, sys, tempfile, multiprocessing, asyncio, torch, jupyter_client
sys.modules.update(dict.fromkeys(("resource", "fcntl", "pwd", "grp")))
for module, names in {{os: {POSIX["os"]}, signal: {POSIX["signal"]}}}.items():
    for name in names:
        delattr(module, name)
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-q", "-m", "", "-p", "no:cacheprovider"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="here the modules are missing already")
def test_all_tests_are_collected_without_what_only_posix_has():
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("times", [2, 99])
def test_a_file_that_a_virus_scanner_holds_for_a_moment_is_replaced_after_it(tmp_path, monkeypatch, times):
    replace, tried, slept = os.replace, [], []

    def held(*paths):
        tried.append(paths)
        if len(tried) <= times:
            raise PermissionError(13, "Access is denied")
        replace(*paths)

    monkeypatch.setattr(checkpoints.time, "sleep", slept.append)
    run = take(make_run(tmp_path))
    save(run, value=1.0)
    monkeypatch.setattr(os, "replace", held)
    if times == 2:
        save(run, value=2.0)
        assert len(tried) == 3 and 0 < sum(slept) < 1
    else:
        with pytest.raises(UsageError, match=r"cannot write .*block_0\.pt; .*untouched.* \(Access is denied\)"):
            save(run, value=2.0)
        assert len(tried) == 5 and sum(slept) < 2
    monkeypatch.setattr(os, "replace", replace)
    assert float(run.load_block(0)["weights"]["w"][0]) == (2.0 if times == 2 else 1.0)
    assert not list(tmp_path.glob(".block_0.pt.*"))


def test_without_locks_a_run_trains_and_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "fcntl", None)
    assert train(make_run(tmp_path)) == [0, 1, 2]
    err = capsys.readouterr().err
    assert err.count("warning: no locks here (Windows has no flock)") == 3 and "trains block 2" in err


def test_blocks_in_a_folder_with_foreign_letters_are_read(tmp_path, monkeypatch):
    """PyTorch's own reader opens paths by the C library, which knows only the letters of Windows' code page."""
    reader = torch.serialization._open_zipfile_reader

    def strict(name_or_buffer):
        assert not isinstance(name_or_buffer, str | os.PathLike) or str(name_or_buffer).isascii()
        return reader(name_or_buffer)

    monkeypatch.setattr(torch.serialization, "_open_zipfile_reader", strict)
    run = take(make_run(tmp_path / "Läufe 日本"))
    save(run)
    assert run.step_of(0) == 5 and torch.equal(run.load_block(0)["weights"]["w"], torch.ones(4000))


def test_torchrun_without_libuv_is_one_line_that_names_the_variable(monkeypatch):
    def rendezvous(url):
        raise RuntimeError("use_libuv was requested but PyTorch was built without libuv support.\nException raised")

    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    with pytest.raises(UsageError) as error:
        join()
    assert "without libuv support" in str(error.value) and "set USE_LIBUV=0" in str(error.value)
    assert "\n" not in str(error.value)


def test_texts_are_read_and_written_as_utf_8_whatever_the_locale_is():
    """A look at every call of Path.read_text and Path.write_text, and of open for other files than of bytes."""
    paths = [path for folder in ("nano_db", "experiments", "data") for path in (ROOT / folder).rglob("*.py")]
    paths += ROOT.glob("train_*.py")
    assert len(paths) > 50
    for path in paths:
        for call in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            of_path = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
            modes = [a.value for a in call.args[1:] if isinstance(a, ast.Constant)]
            of_text = ast.unparse(call.func) == "open" and not any("b" in mode for mode in modes)
            variable = ast.unparse(call.func) == "open" and any(not isinstance(a, ast.Constant) for a in call.args[1:])
            if of_path or (of_text and not variable):
                assert "encoding" in [keyword.arg for keyword in call.keywords], f"{path}:{call.lineno}"
