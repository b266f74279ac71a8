"""Fetch one file over https, once, and trust it only if its checksum matches."""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from nano_db.errors import UsageError

TRIES, PAUSE = 3, 2  # attempts, and seconds between them
CHUNK = 2**20  # bytes
REPORT_EVERY = 5  # seconds


def fetch(url, path, checksum, size, algorithm="sha256"):
    """Return `path`, downloaded from `url` if it is not there yet. Either way, its content has this checksum.

    algorithm: the checksum's, any that hashlib has. size: bytes expected; a longer response is cut off. There are
    three attempts; each resumes where the last was cut short. Raises UsageError without network or for a wrong file.
    """
    path = Path(path)
    if os.path.exists(path):
        if path.is_dir() or not _is_sound(path, checksum, algorithm):
            fault = f"{path} is not the expected file (its {algorithm} is not {checksum[:16]}...)"
            raise UsageError(f"{fault}: delete it to download it again")
        return path
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): make room, or put it there yourself") from error
    try:
        for left in reversed(range(TRIES)):
            try:
                if not _is_sound(part, checksum, algorithm):  # it is, if only the renaming has failed
                    _download(url, part, size)
                have = part.stat().st_size
                if _is_sound(part, checksum, algorithm):
                    os.replace(part, path)
                    return path
                if have >= size:
                    part.write_bytes(b"")
                    raise OSError(f"the server sent a different file: its {algorithm} is not {checksum[:16]}...")
                raise OSError(f"it was cut short, after {have:,} of {size:,} bytes")
            except (OSError, http.client.HTTPException) as error:  # URLErrors and time-outs are OSErrors
                if getattr(error, "code", 0) == 416:  # all of it was received, and it is corrupt
                    part.write_bytes(b"")
                reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
                reason = reason or type(error).__name__
            if left:
                print(f"download of {path.name} failed ({reason}): trying again", file=sys.stderr)
                time.sleep(PAUSE)
    finally:
        part.unlink(missing_ok=True)
    raise UsageError(f"cannot download {url} ({reason}): try again later, or fetch it elsewhere and put it at {path}")


def _download(url, part, size):
    """Append the rest to the file `part` if the server can resume in the middle; otherwise start again."""
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if not getattr(answer, "url", url).startswith("https://"):  # also after redirects
            raise OSError("not https")
        partial = getattr(answer, "status", 200) == 206
        have, reported = have if partial else 0, time.monotonic()
        with open(part, "ab" if partial else "wb") as file:
            while chunk := answer.read(min(CHUNK, size + 1 - have)):  # one byte too many: it is another file
                file.write(chunk)
                have += len(chunk)
                if time.monotonic() - reported > REPORT_EVERY:
                    reported = time.monotonic()
                    print(f"{part.stem}: {have / 1e6:.0f} of {size / 1e6:.0f} MB", file=sys.stderr)


def _is_sound(path, checksum, algorithm):
    found = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest() == checksum
