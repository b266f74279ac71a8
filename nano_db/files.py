"""Files that are whole, whatever happens: written aside and renamed, and verified before they are read.

The checkpoint of a block is such a file: tensors and plain values, in the zip archive that torch.save writes.
"""

import json
import os
import secrets
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from nano_db.errors import UsageError

FORMAT = "nano_db block 1"
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
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UsageError(
            f"cannot write {path} ({reason}); what it held before is untouched: "
            "make room or choose another --out, then run again"
        ) from error


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_block(path, whole=True):
    """The dictionary in a block's file (Run.save_block), its tensors on the CPU. No code in it is ever run.

    whole=False: its tensors are mapped, not read, and their checksums not verified: a cheap way to its step and
    settings. Raises UsageError for a file that is damaged or none of ours.
    """
    path = Path(path)
    mend = f"move it away to train {path.stem.replace('_', ' ')} afresh"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would not notice flipped bytes inside a tensor
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:  # torch.save never packs: this might unpack without end
                    raise zipfile.BadZipFile(f"{member.filename} is compressed")
                if whole or member.filename.endswith("data.pkl"):
                    archive.read(member)  # verifies its checksum
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise UsageError(f"{path} is damaged or no block of nano_db ({type(error).__name__}): {mend}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"{path} is no block of nano_db: {mend}")
    wrong = [name for name, kind in CONTENT.items() if not isinstance(state.get(name, ...), kind)]
    if not wrong and (state["step"] < 0 or any(map(torch.is_tensor, state["settings"].values()))):
        wrong = ["step or settings"]
    if wrong:
        raise UsageError(f"{path} is damaged (no sound {', '.join(wrong)}): {mend}")
    return state
