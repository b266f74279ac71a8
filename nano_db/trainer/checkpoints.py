"""The files of a run.

    config.json        script, settings, data checksum, versions
    block_<b>.pt       weights, optimizer state, step and settings of one block
    metrics_<b>.jsonl  a line per logging interval of block b
    metrics.jsonl      a line per evaluation
    result.json        the figures at the end, and the settings they were evaluated with

Every file but the metrics is written aside, flushed to the disk and renamed: whatever happens to the process, the file
that stands there is whole. Every file is verified before it is read, and no code in it is ever run.
"""

import hashlib
import json
import os
import platform
import re
import secrets
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import torch

from nano_db import __version__
from nano_db.errors import UsageError, is_out_of_memory
from nano_db.layers import open_gates

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What the two kinds of files hold that are read again:
BLOCK = dict(block=int, step=int, seconds=int | float, settings=dict, weights=dict, optimizer=dict, ema=dict | None)
CONFIG = dict(script=str, settings=dict, depends_on=dict, versions=dict)
PATHS = {"data": "data_sha256", "init_from": "init_from_sha256"}  # settings that say where, and checksums of what


@contextmanager
def explained(message, kinds=Exception):
    """A context in which errors of these kinds become UsageErrors: the message, with the reason in brackets. But a lack
    of memory stays what it is.
    """
    try:
        yield
    except kinds as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{message} ({getattr(error, 'strerror', None) or type(error).__name__})") from error


def require(sound):
    """An assertion that `python -O` does not take away."""
    if not sound:
        raise ValueError


def write_atomically(path, write):
    """Call write(file) on a temporary neighbour of `path`, then put it in the path's place."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    advice = "what it held before is untouched: make room on the disk or choose another --out, then run again"
    # torch.save reports a failed write as a RuntimeError.
    with explained(f"cannot write {path}; {advice}", (OSError, RuntimeError)):
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with suppress(OSError):  # there is none, if all went well
                aside.unlink()


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def append_json(path, record):
    """Append a line to a file of metrics."""
    line = json.dumps(record).encode() + b"\n"
    with explained(f"cannot write {path}: make room, then run again", OSError), open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = b"\n" + line  # a killed process left half a line: it stays alone, and read_metrics skips it
        file.write(line)


def read_block(path):
    """The dictionary in a block's file (Run.save_block), its tensors on the CPU. Raises UsageError for a file that is
    damaged, or not a block's.
    """
    path = Path(path)
    advice = f"move it away to train {path.stem.replace('_', ' ')} afresh"
    with explained(f"{path} is damaged or no block of nano_db: {advice}"):  # damaged bytes raise nearly anything
        with zipfile.ZipFile(path) as archive:  # torch.load would not notice flipped bytes inside a tensor
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # torch.save never packs: this might unpack without end
                    raise zipfile.BadZipFile(f"{member.filename} is compressed")
                archive.read(member)  # verifies its checksum
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(all(isinstance(state[name], kind) for name, kind in BLOCK.items()) and state["step"] >= 0)
        require(not any(map(torch.is_tensor, state["settings"].values())))
    return state


def differences(there, here):
    """In words, the settings of `here` that `there` has otherwise. Paths may differ: the checksums decide."""
    alike = [path for path, checksum in PATHS.items() if there.get(checksum) == here.get(checksum)]
    return [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v and k not in alike]


def identity(config):
    """What the weights depend on, by name, as a config.json says it (and other settings, too)."""
    about = {"script": config["script"], "version": config["versions"].get("nano_db")}
    return {**config["settings"], **about, **config["depends_on"]}


def read_config(folder):
    path = Path(folder) / "config.json"
    if not os.path.exists(path):
        raise UsageError(f"{folder} holds no run (no config.json): train one first, or name its folder with --out")
    with explained(f"{path} is damaged: move the folder away, or choose another --out"):
        config = json.loads(path.read_text())
        require(all(isinstance(config[name], kind) for name, kind in CONFIG.items()))
    return config


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
    with explained(f"cannot write {path}: choose another --out", OSError):
        file = open(path, "a+")  # noqa: SIM115 - its closing is what frees the lock
    with file:
        try:
            if fcntl is None:
                raise OSError(None, "Windows has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            held = f"{purpose} is held by {file.read(200).strip() or 'another process'} (it holds {path})"
            raise UsageError(f"{held}: wait for its end, or stop it, then run again") from None
        except OSError as error:  # Windows, and some cluster file systems
            warning = f"warning: no locks here ({error.strerror}): see to it that no other process trains {purpose}"
            print(warning, file=sys.stderr)
        with suppress(OSError):  # on a full disk the owner remains unnamed
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


# --- --init-from: blocks that start from the layers of a trained network ---


def initial_weights(settings):
    """(weights, sha256, state) of the network to start from: averaged weights if there are any; and all of its file."""
    path, sha256 = Path(settings.init_from) / "block_0.pt", hashlib.sha256()
    if not path.exists():
        raise UsageError(f"--init-from: {path} is missing, and a block that has not begun needs it")
    state = read_block(path)
    weights = state["ema"] or state["weights"]
    with explained(f"--init-from: {path} holds no weights"):
        for name, tensor in sorted(weights.items()):
            sha256.update(name.encode() + tensor.numpy().tobytes())
    return weights, sha256.hexdigest(), state


def initial_checksum(settings, script, data_sha256):
    """The checksum of the network to start from. A run that has begun has it in its config.json, and the network may be
    gone. Raises UsageError unless it is a finished --baseline of the same script, version, network and data.
    """
    if (Path(settings.out) / "config.json").exists():
        config = read_config(settings.out)
        if config["settings"].get("init_from") == settings.init_from:
            return config["depends_on"].get("init_from_sha256")
    _, sha256, state = initial_weights(settings)
    there = state["settings"]
    here = {"script": script, "version": __version__, "data_sha256": data_sha256}
    for f in fields(settings):
        of_both = f.metadata["group"] in ("network", "method") and not (f.metadata["of"] or f.metadata["resumable"])
        if of_both or f.name in ("data", "tokenizer"):
            here[f.name] = getattr(settings, f.name)
    if different := differences(there, here | {"baseline": True}):
        needed = f"needs a --baseline of the same script, version, network and data ({'; '.join(different)})"
        raise UsageError(f"--init-from {settings.init_from}: this run {needed}")
    if state["step"] != there.get("steps"):
        reached = f"step {state['step']} of {there.get('steps')}"
        raise UsageError(f"--init-from {settings.init_from} is not finished: {reached}")
    return sha256


def layers_of(network, own, first):
    """`own`, the first weights of a block, with those of the trained `network` from its layer number `first` on, and of
    what surrounds them. Both are state_dicts. What the network does not have, or has in another shape, stays as it is:
    a denoising head, say. But a layer that is modulated only in the block gets open gates, for behind gates that are
    zero the layers would do nothing.
    """
    begun = {}
    for name, weight in own.items():
        there = re.sub(r"^network\.layers\.(\d+)", lambda found: f"network.layers.{first + int(found[1])}", name)
        fits = there in network and network[there].shape == weight.shape
        begun[name] = network[there] if fits else weight
        layer = re.fullmatch(r"(network\.layers\.\d+)\.modulation\.bias", there)
        if layer and there not in network and f"{layer[1]}.attention.qkv.weight" in network:
            begun[name] = open_gates(weight)
    return begun
