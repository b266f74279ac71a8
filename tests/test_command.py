"""What a command prints can be shown anywhere, and what a user can fix is said in one line."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

import train_gpt
import train_mdm
from experiments import compare
from nano_db.errors import UsageError, compiler_fault
from nano_db.trainer.command import Screen, command

TEXT = "Ähnlich wie der Zug – 日本語の文章、 und zurück. " * 60


def environment(**more):
    """Of a process with a thread, and without the variables that decide what a terminal can show."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "PYTHONIOENCODING")}
    return kept | {"OMP_NUM_THREADS": "1"} | more


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_samples_that_the_terminal_cannot_show_are_written_and_the_run_ends(tmp_path, encoding):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    line = [sys.executable, "train_gpt.py", *SMALL, "--data", tmp_path / "text.txt", "--out", tmp_path / "run"]
    for _ in range(2):
        done = subprocess.run(line, cwd=ROOT, env=environment(PYTHONIOENCODING=encoding), capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert (tmp_path / "run" / "result.json").exists()
        sample = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
        assert set(sample) & set("日本語の文章、") and done.stdout.decode(encoding)
        assert (encoding == "utf-8") == (sample.splitlines()[0] in done.stdout.decode(encoding))


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", [["-u"], []])
def test_a_run_continues_when_nobody_reads_what_it_prints(tmp_path, text_file, unbuffered):
    line = [sys.executable, *unbuffered, "train_gpt.py", *SMALL, "--data", text_file, "--out", tmp_path / "run"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as run:
        run.stdout.readline()
        run.stdout.close()  # as `| head -1` does
        err = run.stderr.read()
    assert run.returncode == 0 and not err and (tmp_path / "run" / "result.json").exists()


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("main", [train_gpt.main, train_mdm.main])
def test_what_a_script_prints_never_raises(cli, tmp_path, main):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    terminal = Terminal("ascii")
    with contextlib.redirect_stdout(terminal):
        code, _, err = cli(*SMALL, "--data", tmp_path / "text.txt", "--out", tmp_path / "日本", main=main)
    assert code == 0, err
    assert "\\u65e5\\u672c: block_0.pt" in terminal.shown() and (tmp_path / "日本" / "samples.txt").exists()


@pytest.mark.parametrize("said", [(), ("progress is saved: run the same command again to resume",)])
def test_an_interruption_claims_no_more_than_was_saved(cli, said):
    def interrupted(flags=None):
        raise KeyboardInterrupt(*said)

    code, _, err = cli(main=interrupted)
    assert (
        code == 130
        and err.strip() == f"stopped; {said[0] if said else 'what had been saved is kept: repeat the command to go on'}"
    )


def test_the_table_of_compare_never_raises(tmp_path, monkeypatch):
    terminal = Terminal("ascii")
    result = {"script": "gpt", "method": "blocks", "blocks": 1, "steps": 1, "parameters": 1, "metrics": {"a": 1.0}}
    result |= {"memory_bytes": {"total": 1}, "seconds_per_step_all_blocks": 1.0}
    monkeypatch.setattr(compare, "read_result", lambda folder: result)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "läufe")])
    with contextlib.redirect_stdout(terminal):
        command(compare.main)
    assert "l\\xe4ufe" in terminal.shown()


def test_samples_are_files_before_they_are_printed(small, tmp_path, monkeypatch):
    def printed(*values, **options):
        if any("---" in str(value) for value in (*values, options.get("sep", ""))):
            raise RuntimeError("the terminal is gone")

    monkeypatch.setattr("builtins.print", printed)
    with pytest.raises(RuntimeError):
        small("--out", tmp_path / "run")
    assert (tmp_path / "run" / "samples.txt").stat().st_size > 0


class Closed(io.StringIO):
    encoding = "ascii"

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [Closed(), None])
def test_a_stream_that_is_gone_or_was_never_there_is_no_fault(stream):
    ran = []
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir())) if open_files.exists() else 0
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        command(lambda: ([print("日本", flush=True) for _ in range(20)], ran.append(1)))
        with pytest.raises(SystemExit) as stop:
            command(lambda: (_ for _ in ()).throw(UsageError("日本")))
    assert ran == [1] and stop.value.code == 2
    assert not before or len(list(open_files.iterdir())) == before


def test_what_is_still_in_the_buffer_is_printed_at_the_end_and_a_slow_reader_loses_a_piece_only():
    class Slow(Terminal):
        full = False

        def write(self, text):
            if self.full:
                raise BlockingIOError
            return super().write(text)

    terminal = Slow("utf-8")
    with contextlib.redirect_stdout(terminal):
        command(lambda: print("one"))
        assert terminal.buffer.getvalue() == b"one\n"
        terminal.full = True
        command(lambda: print("two"))
        terminal.full = False
        command(lambda: print("three"))
    assert terminal.shown() == "one\nthree\n"


def test_a_screen_is_like_the_stream_behind_it():
    terminal = Terminal("latin-1")
    screen = Screen(terminal)
    print("ä ö 日", file=screen)
    assert screen.encoding == "latin-1" and not screen.isatty()
    assert terminal.shown() == "ä ö \\u65e5\n"


# --- torch.compile ---


@pytest.mark.slow
def test_without_a_compiler_compile_is_refused_in_one_line(tmp_path, text_file):
    """With an empty PATH, and a cache that has not seen this network."""
    line = [sys.executable, "train_gpt.py", *SMALL, "--data", text_file, "--out", tmp_path / "run"]
    env = environment(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    env.pop("CXX", None)
    done = subprocess.run([*line, "--compile"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no C++ compiler" in done.stderr, done.stderr
    assert "without --compile the same run trains" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TorchDynamoException(RuntimeError):  # its name is what counts: importing the true one takes seconds
    pass


def test_every_way_in_which_compilation_fails_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    for said, expected in (
        ("InvalidCxxCompiler: No working C++ compiler found in torch._inductor", "there is no C++ compiler"),
        ("RuntimeError: Compiler: cl is not found.", "there is no C++ compiler"),
        ("Cannot find a working triton installation.\nEither", "Triton is missing, or does not support this GPU"),
        ("Found Tesla P100 which is too old to be supported by the triton GPU compiler", "does not support this GPU"),
        ("CppCompileError: C++ compile error\n\nCommand:", "because Python's header files are missing"),
    ):

        def main(said=said):
            raise TorchDynamoException(said)

        with pytest.raises(SystemExit) as stop:
            command(main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and expected in err and err.count("\n") == 1, err
    assert "Python 3.15" in compiler_fault(RuntimeError("torch.compile is not supported on Python 3.15+"))
    for other in (RuntimeError("shapes differ"), ValueError("Compiler:"), TorchDynamoException("a fault of the model")):
        assert not compiler_fault(other), "of which the traceback is needed"


def test_the_true_errors_have_the_names_by_which_they_are_known():
    from torch._dynamo.exc import TorchDynamoException as True_
    from torch._inductor.exc import InvalidCxxCompiler, TritonMissing

    assert True_.__name__ == TorchDynamoException.__name__ and issubclass(TritonMissing, True_)
    assert "C++ compiler" in compiler_fault(True_(f"InvalidCxxCompiler: {InvalidCxxCompiler()}"))
    assert "Triton" in compiler_fault(TritonMissing(None))


# --- a Mac, and other machines that are not here ---


def test_on_a_mac_the_first_line_says_that_its_gpu_is_not_used(small, tmp_path, monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        code, out, err = small("--out", tmp_path / str(there), "--only", "0")
        assert code == 0 and ("--device mps would use this Mac's GPU" in out) == there, err
