"""The output folder of a run: its settings, its metrics, and one file a block.

    config.json        settings, versions, data checksum
    block_<b>.pt       weights, optimizer state, step and settings of one block
    metrics_<b>.jsonl  a line per logging interval of block b
    metrics.jsonl      a line per evaluation
    result.json        the figures at the end

A folder belongs to one set of settings. Every file but the metrics is written aside, flushed to the disk and renamed,
so that at any moment, whatever happens to the process, the file that stands there is whole. Several processes, on
several machines, may share a folder: whoever trains block b holds .block_<b>.lock (lock.py) and alone writes the files
of block b.
"""

import json
import os
import platform
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from nano_db.errors import UsageError
from nano_db.files import FORMAT, read_block, write_atomically, write_json, write_text  # noqa: F401 - found here, too
from nano_db.lock import lock


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


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
        if self._is_free():
            with lock(self.folder / ".config.lock", "config.json", wait=True):
                if self._is_free():  # still: no process of the same job has been quicker
                    self._take(about)

    def _is_free(self):
        """Whether config.json is still to be written. Raises UsageError where the folder belongs to another run."""
        config, has_blocks = self.folder / "config.json", any(self.folder.glob("block_*.pt"))
        if not config.exists() and has_blocks:
            raise UsageError(
                f"{self.folder} holds block files but no config.json: it is no run of ours. Choose another --out"
            )
        there = all_settings(read_config(self.folder)) if config.exists() else {}
        different = differences(there, self.frozen)
        if different and has_blocks:
            raise UsageError(
                f"{self.folder} holds a run of other settings: {'; '.join(different)}. Choose another --out"
            )
        return bool(different)  # nothing has been trained here yet

    def _take(self, about):
        for path in self.folder.glob(".block_*.lock"):  # a run of other settings may be about to write its first block
            with lock(path, path.stem[1:].replace("_", " ")):
                pass
        for path in self.folder.glob("metrics*.jsonl"):
            path.unlink()
        write_json(self.folder / "config.json", {"settings": self.settings, "about": about, "versions": versions()})

    # --- blocks ---

    def block_path(self, b):
        return self.folder / f"block_{b}.pt"

    def save_block(self, b, step, seconds, weights, optimizer, ema=None):
        """seconds: pure training time so far. All is tensors and plain values, to be read with weights_only=True."""
        state = {"format": FORMAT, "block": b, "step": step, "seconds": seconds, "settings": self.frozen}
        state |= {"weights": weights, "optimizer": optimizer, "ema": ema}
        write_atomically(self.block_path(b), lambda file: torch.save(state, file))

    def load_block(self, b, whole=True):
        """The dictionary that save_block wrote, on the CPU, or None where block b has no file yet.

        whole=False: for its step and the like, as in read_block.
        """
        path = self.block_path(b)
        if not path.exists():
            return None
        state = read_block(path, whole)
        if state["block"] != b:
            raise UsageError(f"{path} holds block {state['block']}: it has been renamed or copied over block {b}")
        if different := differences(state["settings"], self.frozen):
            raise UsageError(f"{path} does not belong to this run: {'; '.join(different)}")
        return state

    @contextmanager
    def lock_block(self, b):
        """Keep other processes from training block b. What a killed owner left half-written is removed."""
        with lock(self.folder / f".block_{b}.lock", f"block {b}"):
            for aside in self.folder.glob(f".block_{b}.pt.*"):
                aside.unlink(missing_ok=True)
            yield

    # --- metrics ---

    def log(self, **record):
        """Append a record to the metrics: to those of its block, if it names one, which its trainer alone writes."""
        path = self.folder / (f"metrics_{record['block']}.jsonl" if "block" in record else "metrics.jsonl")
        try:
            with open(path, "ab+") as file:
                line = json.dumps(record).encode() + b"\n"
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    line = b"\n" + line  # a killed process left half a line: it stays alone, and read_metrics skips it
                file.write(line)
        except OSError as error:
            raise UsageError(f"cannot write {path} ({error.strerror}): make room, then run again") from error

    def result(self):
        """The result of an earlier finish, or an empty dictionary."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / "result.json").read_text())
        return {}

    def finish(self, result):
        write_json(self.folder / "result.json", {**result, "versions": versions()})


def differences(there, here):
    """In words, the settings of `here` that `there` has otherwise."""
    return [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]


def all_settings(config):
    """What a config.json says, by name: settings, and what else the weights depend on."""
    return {**config["settings"], **config["about"]}


def read_folder(folder, whole=False):
    """(config, {b: {"step", "seconds"}}) of a run's folder. whole: verify the tensors' checksums, too (read_block).

    Raises UsageError where a block's file does not belong to the config.json beside it, and names the difference.
    """
    config, states = read_config(folder), {}
    here = all_settings(config)
    for path in sorted(Path(folder).glob("block_*.pt")):
        state = read_block(path, whole)
        if path.name != f"block_{state['block']}.pt":
            raise UsageError(f"{path} holds block {state['block']}: it has been renamed or copied")
        if different := differences(state["settings"], {name: here.get(name) for name in state["settings"]}):
            raise UsageError(
                f"{path} does not belong to {folder}/config.json: {'; '.join(different)} (there: the block's file)"
            )
        states[state["block"]] = {"step": state["step"], "seconds": state["seconds"]}
    return config, states


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
