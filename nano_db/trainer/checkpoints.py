"""The files of a run.

    config.json        script, settings, data checksum, versions, and what sampling needs of the data
    block_<b>.pt       weights, optimizer state, step and settings of one block
    metrics_<b>.jsonl  a line per logging interval of block b
    metrics.jsonl      a line per evaluation
    result.json        the final numbers, and the settings they were evaluated with

Every file but the metrics is written to a temporary file, flushed to the disk and renamed: whatever happens to the
process, the file under its final name is complete. Files are verified before they are used, and no code in them is run.
"""

import json
import math
import os
import platform
import secrets
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nano_db.errors import UsageError, is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The contents of the two kinds of files that are read back:
BLOCK = dict(block=int, step=int, seconds=int | float, settings=dict, weights=dict, optimizer=dict, ema=dict | None)
CONFIG = dict(script=str, settings=dict, depends_on=dict, versions=dict)
# What a run keeps of its data, in config.json:
KEEPS = dict(vocabulary=str, opening=str, classes=list, shape=list, p_mean=float, sigma_data=float)
PATHS = {"data": "data_sha256", "init_from": "init_from_sha256"}  # settings that are paths, and their files' checksums


@contextmanager
def explained(message, kinds=Exception):
    """A context in which errors of these kinds become UsageErrors: the message, with the reason in brackets. An
    out-of-memory error stays as it is.
    """
    try:
        yield
    except kinds as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{message} ({getattr(error, 'strerror', None) or type(error).__name__})") from error


def require(sound):
    """An assertion that `python -O` does not remove."""
    if not sound:
        raise ValueError


def write_atomically(path, write):
    """Call write(file) on a temporary file next to `path`, then rename it to `path`."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    advice = "what it held before is untouched: make room on the disk or choose another --out, then run again"
    # torch.save reports a failed write as a RuntimeError.
    with explained(f"cannot write {path}; {advice}", (OSError, RuntimeError)):
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            replace(aside, path)
        finally:
            with suppress(OSError):  # there is none, if all went well
                aside.unlink()


def make_folder(folder, flag="--out"):
    """Make the folder that `flag` names, and those above it, unless it is there. Raises UsageError if it cannot be."""
    with explained(f"cannot make {folder}: choose another {flag}", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)


def replace(source, target):
    """os.replace, with up to five attempts: on Windows a virus scanner may hold a new file for a moment."""
    for pause in (0.1, 0.2, 0.4, 0.8):
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(pause)
    return os.replace(source, target)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def append_json(path, record):
    """Append a line to a file of metrics."""
    line = json.dumps(record).encode() + b"\n"
    with explained(f"cannot write {path}: make room on the disk, then run again", OSError), open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = b"\n" + line  # a killed process left half a line, which read_metrics skips
        file.write(line)


def read_block(path):
    """The dictionary in a block's file (Run.save_block), its tensors on the CPU. Raises UsageError if the file is
    damaged, or not a block.
    """
    path = Path(path)
    advice = f"move it away to train {path.stem.replace('_', ' ')} from scratch"
    with explained(f"{path} is damaged or not a nano_db block: {advice}"):  # damaged bytes raise nearly anything
        with open(path, "rb") as file:  # PyTorch cannot open a path with letters outside Windows' code page
            with zipfile.ZipFile(file) as archive:  # torch.load would not notice flipped bytes inside a tensor
                for member in archive.infolist():
                    if member.compress_type != zipfile.ZIP_STORED:  # torch.save never compresses: maybe a zip bomb
                        raise zipfile.BadZipFile(f"{member.filename} is compressed")
                    archive.read(member)  # verifies its checksum
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        require(all(isinstance(state[name], kind) for name, kind in BLOCK.items()) and state["step"] >= 0)
        require(not any(map(torch.is_tensor, state["settings"].values())))
    return state


def differences(there, here):
    """In words, how the settings `there` differ from those `here`. Paths may differ: the checksums decide."""
    alike = [path for path, checksum in PATHS.items() if there.get(checksum) == here.get(checksum)]
    return [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v and k not in alike]


def identity(config):
    """What the weights depend on, by name, according to a config.json (and other settings, too)."""
    about = {"script": config["script"], "version": config["versions"].get("nano_db")}
    return {**config["settings"], **about, **config["depends_on"]}


def read_config(folder, flag="--out"):
    """A run's config.json. flag: the one with which the user named the folder."""
    path = Path(folder) / "config.json"
    if not os.path.exists(path):
        raise UsageError(f"{folder} holds no run (no config.json): train one first, or name its folder with {flag}")
    with explained(f"{path} is damaged: move the folder away, or choose another --out"):
        config = json.loads(path.read_text(encoding="utf-8"))
        require(all(isinstance(config[name], kind) for name, kind in CONFIG.items()))
        keeps = config.setdefault("keeps", {})
        require(all(isinstance(value, KEEPS[name]) for name, value in keeps.items()))
        require(all(isinstance(name, str) for name in keeps.get("classes", [""])) and keeps.get("classes", [""]))
        require(all(isinstance(side, int) and 0 < side < 2**15 for side in keeps.get("shape", [])))
        require(len(keeps.get("shape", "CHW")) == 3)
        require(math.isfinite(keeps.get("p_mean", 0.0)) and 0 < keeps.get("sigma_data", 1.0) < math.inf)
        json.dumps(keeps, ensure_ascii=False).encode()  # UnicodeError for lone surrogates
    return config


def kept(settings):
    """What a run has kept of its data (Run), for the loaders of data/: with --eval-only this run, plus its data's
    "sha256"; with --init-from the run to start from; for a new run nothing.
    """
    if settings.eval_only:
        config = read_config(settings.out)
        return {**config["keeps"], "sha256": config["depends_on"].get("data_sha256")}
    if not settings.init_from:
        return {}
    if os.path.exists(Path(settings.out) / "config.json"):  # it has begun: the other run may be gone
        return read_config(settings.out)["keeps"]
    return read_config(settings.init_from, "--init-from")["keeps"]


def read_metrics(folder, kind):
    """Records of one kind ("train" or "evaluation") by block and step. A step repeated after a kill counts once."""
    latest = {}
    for path in sorted(Path(folder).glob("metrics*.jsonl")):
        for line in path.read_bytes().splitlines():
            # A damaged line must not prevent the plot. (OverflowError: a step of 1e999 is infinite.)
            with suppress(ValueError, KeyError, TypeError, RecursionError, OverflowError):
                record = json.loads(line)
                if record["kind"] == kind:
                    latest[int(record.get("block", -1)), int(record["step"])] = record
    return [latest[key] for key in sorted(latest)]


@contextmanager
def lock(path, purpose, wait=False):
    """Hold the lock file `path`, which guards `purpose` (like "block 2"), while the context lasts. Raises UsageError
    if another process holds it, and says which; with wait, waits for that process instead.
    """  # flock: the system frees it when its owner ends, even by SIGKILL, and it works across machines over NFS
    with explained(f"cannot write {path}: choose another --out", OSError):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closing it frees the lock
    with file:
        try:
            if fcntl is None:
                raise OSError(None, "Windows has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            held = f"{purpose} is held by {file.read(200).strip() or 'another process'} (it holds {path})"
            raise UsageError(f"{held}: wait until it ends, or stop it, then run again") from None
        except OSError as error:  # Windows, and some cluster file systems
            if not wait:  # else it is held only for a moment
                advice = f"make sure that no other process trains {purpose}"
                print(f"warning: no locks here ({error.strerror}): {advice}", file=sys.stderr)
        with suppress(OSError):  # on a full disk the owner remains unnamed
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
