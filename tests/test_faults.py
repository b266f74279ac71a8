"""What a user's machine may do to a run. After each fault: no good file lost, one clear line, and a resumed run that
ends in the undisturbed run's weights bit for bit.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch._dynamo  # as the plots below: not to be imported anew in each fork
from conftest import ROOT, SMALL, needs_fork, needs_namespaces, same, tensors
from test_run import make_run, train

import nano_db.trainer.plots  # noqa: F401
import train_gpt
from nano_db.errors import UsageError
from nano_db.trainer.checkpoints import read_block, read_config, read_metrics
from nano_db.trainer.command import command
from nano_db.trainer.run import Run

FLAGS = [*SMALL, "--blocks", "2", "--rounds", "2"]  # saves each block at steps 5, 6, 10 and 12
BLOCKS, EMA = range(2), 0.9


def start(*flags, sabotage=lambda: None):
    """train_gpt.py in a fork of this process, which needs no second to start: its process id."""
    needs_fork()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.argv = ["train_gpt.py", *map(str, flags)]
        sabotage()
        command(train_gpt.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def end(pid):
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module", autouse=True)
def short_samples_and_averages():
    with pytest.MonkeyPatch.context() as patch:
        quick = {"sample_length": 5, "sampling_steps_per_block": 1, "ema": EMA}
        patch.setitem(train_gpt.PRESETS, "tiny", {**train_gpt.PRESETS["tiny"], **quick})
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, short_samples_and_averages):
    """(flags, folder) of a run that nothing has happened to; not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 80)
    flags = [*FLAGS, "--data", str(folder / "text.txt"), "--out"]
    assert end(start(*flags, folder / "whole")) == 0
    return flags, folder / "whole"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("block_*.pt")}


def assert_resumes(flags, out, whole):
    """The same command ends the run, as if nothing had happened, and leaves nothing half-written."""
    assert end(start(*flags, out)) == 0
    for b in BLOCKS:
        assert same(tensors(out, b), tensors(whole, b))
    assert (out / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    last = lambda folder: [(r["block"], r["step"], r["loss"]) for r in read_metrics(folder, "train")][-1]  # noqa: E731
    assert last(out) == last(whole)
    assert not list(out.glob(".block*.pt.*"))


# --- SIGKILL ---


def watch(pid, folder, changes=float("inf")):
    """Wait until files of the folder have been written so many times, or the process has ended: what a run has done
    does not depend on how fast the machine is. Returns how often that was seen.
    """
    seen = set()
    while len(seen) < changes and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        with suppress(FileNotFoundError):  # not there yet, or renamed meanwhile
            seen |= {(entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder)}
        time.sleep(0.0005)
    return len(seen)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_of_training_saving_and_evaluation(undisturbed, tmp_path):
    flags, whole = ["--steps", "40", "--rounds", "5", *undisturbed[0]], tmp_path / "whole"  # saves every 8 steps
    flags = [flag for i, flag in enumerate(flags) if i < 4 or not {"--steps", "--rounds"} & {flag, flags[i - 1]}]
    began, pid = time.monotonic(), start(*flags, whole)
    changes = watch(pid, whole)
    assert end(pid) == 0
    pause = (time.monotonic() - began) / changes  # between two changes
    rng, found = random.Random(0), []
    for i in range(20):
        out = tmp_path / f"killed{i}"
        pid = start(*flags, out)
        watch(pid, out, changes * (i + rng.random()) / 20)  # all over training, saving and evaluation
        time.sleep(pause * rng.random())
        os.kill(pid, signal.SIGKILL)
        killed = end(pid) == -signal.SIGKILL
        if (out / "config.json").exists():
            read_config(out)
        paths = [out / f"block_{b}.pt" for b in BLOCKS]
        steps = [read_block(path)["step"] if path.exists() else 0 for path in paths]  # what is there is whole
        found.append(f"{steps}" if killed else "at its end")
        assert_resumes(flags, out, whole)
    print("\nblocks' steps when killed:", *found)
    assert len(set(found)) >= 8


def dies(module, name, call, after=False):
    """A sabotage: this process kills itself at the `call`-th call of module.name, before or after it."""

    def sabotage():
        original, calls = getattr(module, name), []

        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) < call:
                return original(*args, **kwargs)
            if after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, deadly)

    return sabotage


def writes_half_and_dies():
    original, calls = torch.save, []

    def save(state, file):
        calls.append(1)
        original(state, file)
        if len(calls) == 4:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


@pytest.mark.parametrize(
    "sabotage",
    [
        writes_half_and_dies,
        pytest.param(dies(os, "fsync", 5), marks=pytest.mark.slow),  # the first is config.json's
        pytest.param(dies(os, "replace", 5), marks=pytest.mark.slow),
        pytest.param(dies(os, "replace", 5, after=True), marks=pytest.mark.slow),
        dies(train_gpt, "keep_samples", 2),  # after the second round
    ],
    ids=["half written", "before the flush", "before the rename", "after the rename", "in the evaluation"],
)
def test_a_kill_at_the_worst_moment_of_a_save(undisturbed, tmp_path, sabotage):
    flags, whole = undisturbed
    assert end(start(*flags, tmp_path / "killed", sabotage=sabotage)) == -signal.SIGKILL
    assert contents(tmp_path / "killed")
    for path in (tmp_path / "killed").glob("block_*.pt"):
        read_block(path)
    assert_resumes(flags, tmp_path / "killed", whole)


# --- disks ---


@pytest.mark.parametrize(
    "code, call",  # 1: config.json; 2 to 5: blocks 0 and 1; 6: samples.txt; 7 to 10: blocks again
    [
        (errno.ENOSPC, 3),
        *(
            pytest.param(*fault, marks=pytest.mark.slow)
            for fault in ((errno.ENOSPC, 1), (errno.ENOSPC, 6), (errno.EROFS, 8), (errno.EIO, 5))
        ),
    ],
)
def test_a_disk_that_refuses_a_save(small, undisturbed, tmp_path, monkeypatch, code, call):
    flags, whole = undisturbed
    fsync, calls, before = os.fsync, [], {}

    def refuse(file):
        calls.append(1)
        if len(calls) == call:
            before.update(contents(tmp_path / "full"))
            raise OSError(code, os.strerror(code))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)
    status, _, err = small(*flags, tmp_path / "full")
    monkeypatch.undo()
    assert status == 2 and "cannot write" in err and os.strerror(code) in err and err.count("\n") == 1, err
    assert contents(tmp_path / "full") == before and not list((tmp_path / "full").glob(".block*.pt.*"))
    assert_resumes(flags, tmp_path / "full", whole)


def on_disk(mount, flags, out):
    """train_gpt.py with `mount`, a shell command, done to `out` in a mount namespace; `out` is copied to out.kept."""
    script = f'{mount} && "$@"; code=$?; cp -r "{out}" "{out}.kept"; exit $code'
    averages = f"train_gpt.PRESETS['tiny']['ema'] = {EMA}"
    program = f"import train_gpt; {averages}; train_gpt.command(train_gpt.main)"
    run = [sys.executable, "-c", program, *map(str, flags), out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, run)]
    return subprocess.run(start, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("files", [0.02, 1.1, 2.5, 3.1])  # what fits: no config.json, one block, two, nearly three
def test_a_disk_that_is_really_full(undisturbed, tmp_path, files):
    flags, whole = undisturbed
    out, kilobytes = tmp_path / "full", int(files * (whole / "block_0.pt").stat().st_size / 1024)
    out.mkdir()
    done = on_disk(f'mount -t tmpfs -o size={kilobytes}k tmpfs "{out}"', flags, out)
    assert done.returncode == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    kept = Path(f"{out}.kept")
    for path in kept.glob("block_*.pt"):
        read_block(path)
    print(f"\n{kilobytes} KiB:", done.stderr.strip(), contents(kept).keys())
    assert_resumes(flags, kept, whole)


@pytest.mark.slow
@needs_namespaces
def test_a_folder_made_read_only(undisturbed, tmp_path):
    """By a mount, which binds root, too."""
    flags, whole = undisturbed
    out = tmp_path / "frozen"
    assert end(start(*flags, out, sabotage=dies(os, "replace", 5))) == -signal.SIGKILL
    before = contents(out)
    done = on_disk(f'mount --bind "{out}" "{out}" && mount -o remount,bind,ro "{out}"', flags, out)
    assert done.returncode == 2 and "Read-only file system" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert contents(out) == before
    assert_resumes(flags, out, whole)
    done = on_disk(f'mount --bind "{out}" "{out}" && mount -o remount,bind,ro "{out}"', ["--eval-only", "--out"], out)
    assert done.returncode == 0 and "bits per character" in done.stdout, done.stderr


# --- damaged files ---


def damage(content, rng):
    """Cut short, or with one to sixteen bits flipped, at a random place."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 2, 16])):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def test_fifty_damaged_checkpoints_are_refused_or_read_as_they_were(small, undisturbed, tmp_path):
    flags, whole = undisturbed
    expected, out = tensors(whole, 1), shutil.copytree(whole, tmp_path / "out")
    good, rng, path, refused = contents(out), random.Random(0), out / "block_1.pt", 0
    for _ in range(50):
        path.write_bytes(damage(good["block_1.pt"], rng))
        try:
            read_block(path)
        except UsageError as error:
            refused += 1
            assert str(path) in str(error) and "move it away to train block 1 from scratch" in str(error)
        else:  # the damage is in padding, or in a name that says nothing of the content
            assert same(tensors(out, 1), expected)
    assert refused >= 40
    path.write_bytes(good["block_1.pt"][:-100])
    code, _, err = small(*flags, out)
    assert code == 2 and "block_1.pt is damaged" in err and err.count("\n") == 1
    assert (out / "block_0.pt").read_bytes() == good["block_0.pt"]
    path.rename(tmp_path / "moved away")  # as the message says
    assert_resumes(flags, out, whole)
    assert (out / "block_0.pt").read_bytes() == good["block_0.pt"]


# --- clocks, data, numbers ---


@pytest.mark.filterwarnings("ignore:Creating legend")  # matplotlib looks at the clock, too
def test_a_clock_that_jumps(small, undisturbed, tmp_path, monkeypatch):
    flags, whole = undisturbed
    rng = random.Random(0)
    monkeypatch.setattr(time, "perf_counter", lambda: rng.uniform(-1e9, 1e9))
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 2e9))
    code, _, err = small(*flags, tmp_path / "jumped")
    monkeypatch.undo()
    assert code == 0, err
    seconds = [r["seconds"] for r in read_metrics(tmp_path / "jumped", "train") if r["block"] == 0]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert_resumes(flags, tmp_path / "jumped", whole)


def test_loading_a_file_is_not_training_time(small, text_file, tmp_path, monkeypatch):
    """By a clock that stands still, except at the end of _restore."""
    clock, restore = [0.0], Run._restore

    def slow(*args):
        at = restore(*args)
        clock[0] += 1000
        return at

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Run, "_restore", slow)
    code, _, err = small("--out", tmp_path / "run")
    assert code == 0, err
    assert all(r["seconds"] == 0 for r in read_metrics(tmp_path / "run", "train"))


def test_data_that_changed_between_start_and_resume(small, undisturbed, tmp_path):
    flags, whole = undisturbed
    out, text = tmp_path / "cut", tmp_path / "text.txt"
    text.write_text((whole.parent / "text.txt").read_text(encoding="utf-8"))
    flags = [*flags[:-2], str(text), "--out"]
    assert end(start(*flags, out, sabotage=dies(os, "replace", 5))) == -signal.SIGKILL
    before, content = contents(out), text.read_text(encoding="utf-8")
    text.write_text(content.replace("fox", "cat", 1))
    code, _, err = small(*flags, out)
    assert code == 2 and "the data has changed" in err and err.count("\n") == 1
    assert contents(out) == before
    text.write_text(content)
    assert_resumes(flags, out, whole)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_batch_with_a_value_that_is_not_finite(tmp_path, poison):
    train(make_run(tmp_path / "whole", ema=0.9, only="1"))
    draws = []

    def corrupted():
        draws.append(1)
        x = torch.randn(16, 4)
        if len(draws) == 13:
            x[3, 2] = poison
        return [x]

    with pytest.raises(UsageError, match=r"block 1: .* at step 13; .*keeps the last good state"):
        train(make_run(tmp_path / "run", ema=0.9, only="1"), batch=corrupted)
    assert int(tensors(tmp_path / "run", 1)[-1]) == 10
    train(make_run(tmp_path / "run", ema=0.9, only="1"))
    assert same(tensors(tmp_path / "run", 1), tensors(tmp_path / "whole", 1))
