"""The output folder of a run: its settings, its metrics, and one file a block.

    config.json      settings, versions, data checksum
    metrics.jsonl    a line per logging interval and per evaluation
    block_<b>.pt     weights, optimizer state, step and settings of one block
    result.json      the figures at the end

A folder belongs to one set of settings. Every file but metrics.jsonl is written aside, flushed to the disk and
renamed, so that at any moment, whatever happens to the process, the file that stands there is whole.
"""

import json
import os
import platform
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from nano_db.errors import UsageError

FORMAT = "nano_db block 1"


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def write_atomically(path, write):
    """Call write(file) on a temporary neighbour of `path`, then put it in the path's place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        with suppress(OSError):
            aside.unlink()
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UsageError(
            f"cannot write {path} ({reason}); what it held before is untouched: "
            "make room or choose another --out, then run again"
        ) from error


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


class Run:
    """The folder of one run. frozen: names of the settings that the weights depend on. about: what else they depend
    on."""

    def __init__(self, folder, settings, frozen, about=None):
        self.folder, self.settings = Path(folder), dict(settings)
        about = about or {}
        self.frozen = {**{name: self.settings[name] for name in frozen}, **about}  # what a block file must agree with
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make the output folder {folder} ({error.strerror}): choose another --out"
            ) from error
        config, has_blocks = self.folder / "config.json", any(self.folder.glob("block_*.pt"))
        if not config.exists() and has_blocks:
            raise UsageError(
                f"{folder} holds block files but no config.json: it is no run of ours. Choose another --out"
            )
        stored = read_config(self.folder) if config.exists() else {"settings": {}, "about": {}}
        there = {**stored["settings"], **stored["about"]}
        different = [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in self.frozen.items() if there.get(k) != v]
        if different and has_blocks:
            raise UsageError(f"{folder} holds a run of other settings: {'; '.join(different)}. Choose another --out")
        if different:  # nothing has been trained here yet: the folder is free
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            write_json(config, {"settings": self.settings, "about": about, "versions": versions()})
        self._mend_metrics()

    # --- blocks ---

    def block_path(self, b):
        return self.folder / f"block_{b}.pt"

    def save_block(self, b, step, seconds, weights, optimizer, ema=None):
        """seconds: pure training time so far. All is tensors and plain values, to be read with weights_only=True."""
        state = {"format": FORMAT, "block": b, "step": step, "seconds": seconds, "settings": self.frozen}
        state |= {"weights": weights, "optimizer": optimizer, "ema": ema}
        write_atomically(self.block_path(b), lambda file: torch.save(state, file))

    def load_block(self, b):
        """The dictionary that save_block wrote, on the CPU, or None where block b has no file yet."""
        path = self.block_path(b)
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load would not notice flipped bytes inside a tensor
                if bad := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling damaged bytes raises nearly anything
            raise UsageError(
                f"{path} is damaged or no block of nano_db ({type(error).__name__}): "
                f"move it away to train block {b} afresh"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise UsageError(f"{path} is no block of nano_db: move it away to train block {b} afresh")
        if state["block"] != b:
            raise UsageError(f"{path} holds block {state['block']}: it has been renamed or copied over block {b}")
        different = [name for name, value in self.frozen.items() if state["settings"].get(name) != value]
        if different:
            raise UsageError(f"{path} was trained with another {', '.join(different)}: it does not belong to this run")
        return state

    # --- metrics ---

    def log(self, **record):
        try:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UsageError(
                f"cannot write {self.folder}/metrics.jsonl ({error.strerror}): make room, then run again"
            ) from error

    def _mend_metrics(self):
        """A killed process may leave half a line at the end: drop it, or the next line would be glued to it."""
        path = self.folder / "metrics.jsonl"
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            write_text(path, content[: content.rfind(b"\n") + 1].decode())

    def result(self):
        """The result of an earlier finish, or an empty dictionary."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / "result.json").read_text())
        return {}

    def finish(self, result):
        write_json(self.folder / "result.json", {**result, "versions": versions()})


def read_config(folder):
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        assert isinstance(config["settings"], dict) and isinstance(config["about"], dict)
        return config
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no run (no config.json): train one first, or name its folder with --out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"{path} is damaged: move the folder away, or choose another --out") from error


def read_metrics(folder, kind):
    """Records of one kind ("train" or "evaluation") by block and step. A step done twice, after a kill, counts once."""
    latest = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        with suppress(ValueError):  # a line that something else damaged is no reason to lose the picture
            record = json.loads(line)
            if record["kind"] == kind:
                latest[record.get("block", -1), record["step"]] = record
    return [latest[key] for key in sorted(latest)]
