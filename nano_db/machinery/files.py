"""The files of a run.

    config.json        script, settings, data checksum, versions
    codes.pt           what is derived from the data before training, where a script does so (run.keep)
    block_<b>.pt       weights, optimizer state, step and settings of one block
    metrics_<b>.jsonl  a line per logging interval of block b
    metrics.jsonl      a line per evaluation
    result.json        the figures at the end, and the settings they were evaluated with

Every file but the metrics is written aside, flushed to the disk and renamed: whatever happens to the process, the file
that stands there is whole. Every file is verified before it is read, and no code in it is ever run.
"""

import json
import os
import platform
import secrets
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nano_db.errors import UsageError, is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "nano_db block 1"
PATHS = {"data": "data_sha256", "start_from": "start_from_sha256"}  # settings that say where, and checksums of what
CONTENT = {
    "block": int,
    "step": int,
    "seconds": (int, float),
    "settings": dict,
    "weights": dict,
    "optimizer": dict,
    "ema": (dict, type(None)),
}


def write_atomically(path, write):
    """Call write(file) on a temporary neighbour of `path`, then put it in the path's place."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        with suppress(OSError):
            aside.unlink()
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"
        mend = "what it held before is untouched: make room or choose another --out, then run again"
        raise UsageError(f"cannot write {path} ({reason}); {mend}") from error


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def read_block(path, whole=True):
    """The dictionary in a block's file (run.save_block), its tensors on the CPU. No code in it is ever run.

    whole=False: its tensors are mapped, not read, and their checksums not verified: a cheap way to its step and
    settings. Raises UsageError for a file that is damaged or none of ours.
    """
    path = Path(path)
    mend = f"move it away to train {path.stem.replace('_', ' ')} afresh"
    state = _load(path, whole, mend)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"{path} is no block of nano_db: {mend}")
    wrong = [name for name, kind in CONTENT.items() if not isinstance(state.get(name, ...), kind)]
    if not wrong and (state["step"] < 0 or any(map(torch.is_tensor, state["settings"].values()))):
        wrong = ["step or settings"]
    if wrong:
        raise UsageError(f"{path} is damaged (no sound {', '.join(wrong)}): {mend}")
    return state


def read_tensors(path):
    """The dictionary in a file of run.keep: its tensors and settings. Raises UsageError as read_block does."""
    mend = "move it away, and it is made anew"
    state = _load(path, True, mend)
    try:
        assert all(map(torch.is_tensor, state["tensors"])) and not any(map(torch.is_tensor, state["settings"].values()))
        return state
    except (KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise UsageError(f"{path} is damaged (no sound settings and tensors): {mend}") from error


def _load(path, whole, mend):
    """torch.load of the file, once its checksums are verified (see read_block). mend: what to do if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would not notice flipped bytes inside a tensor
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # torch.save never packs: this might unpack without end
                    raise zipfile.BadZipFile(f"{member.filename} is compressed")
                if whole or member.filename.endswith("data.pkl"):
                    archive.read(member)  # verifies its checksum
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"{path} is damaged or no block or codes of nano_db ({type(error).__name__}): {mend}"
        ) from error


def differences(there, here):
    """In words, the settings of `here` that `there` has otherwise. Paths may differ: the checksums decide."""
    alike = [path for path, checksum in PATHS.items() if there.get(checksum) == here.get(checksum)]
    return [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v and k not in alike]


def identity(config):
    """What the weights depend on, by name, as a config.json says it (and other settings, too)."""
    versions = config.get("versions")
    version = versions.get("nano_db") if isinstance(versions, dict) else None
    return {**config["settings"], "script": config["script"], "version": version, **config["depends_on"]}


def read_config(folder):
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        assert isinstance(config["script"], str) and isinstance(config["depends_on"], dict)
        assert isinstance(config["settings"], dict)
        return config
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no run (no config.json): train one first, or name its folder with --out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: move the folder away, or choose another --out") from error


def read_metrics(folder, kind):
    """Records of one kind ("train" or "evaluation") by block and step. A step done twice, after a kill, counts once."""
    latest = {}
    for path in sorted(Path(folder).glob("metrics*.jsonl")):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # a damaged line must not cost the picture
                record = json.loads(line)
                if record["kind"] == kind:
                    latest[int(record.get("block", -1)), int(record["step"])] = record
    return [latest[key] for key in sorted(latest)]


@contextmanager
def lock(path, purpose, wait=False):
    """Hold the lock file `path`, which guards `purpose` (like "block 2"), while the context lasts. Raises UsageError
    where another process holds it, and says which; with wait, waits for that process instead.
    """  # the operating system holds it (flock): it ends with its owner, even by SIGKILL, and binds machines over NFS
    try:
        file = open(path, "a+")  # noqa: SIM115 - its closing is what frees the lock
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): choose another --out") from error
    with file:
        try:
            if fcntl is None:
                raise OSError(None, "Windows has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            held = f"{purpose} is in the hands of {file.read(200).strip() or 'another process'} (it holds {path})"
            raise UsageError(f"{held}: wait for its end, or stop it, then run again") from None
        except OSError as error:  # Windows, and some cluster file systems
            warning = f"warning: no locks here ({error.strerror}): see to it that no other process trains {purpose}"
            print(warning, file=sys.stderr)
        with suppress(OSError):  # on a full disk the owner remains unnamed
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
