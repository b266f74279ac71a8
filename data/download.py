"""Fetch one file over https, once, and trust it only by its checksum."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from nano_db.errors import UsageError


def fetch(url, path, checksum, size, algorithm="sha256"):
    """Return `path`, downloaded from `url` if it is not there yet; whichever way, its content has this checksum.

    algorithm: the checksum's, of those hashlib has. size: bytes expected; a longer answer is cut off. Raises UsageError
    without network or with a wrong checksum.
    """
    path = Path(path)
    if path.exists():
        _check(path, path.read_bytes(), checksum, algorithm)
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            if not getattr(answer, "url", url).startswith("https://"):  # also where a redirection led
                raise OSError("not https")
            content = answer.read(size + 1)
    except (urllib.error.URLError, OSError) as error:
        raise UsageError(
            f"cannot download {url} ({getattr(error, 'reason', error)}): "
            f"with no network, fetch it elsewhere and put it at {path}"
        ) from error
    _check(url, content, checksum, algorithm)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): make room, or put it there yourself") from error
    return path


def _check(source, content, checksum, algorithm):
    found = hashlib.new(algorithm, content).hexdigest()
    if found != checksum:
        raise UsageError(
            f"{source} has {algorithm} {found[:16]}..., not the expected {checksum[:16]}...: "
            "delete the file to download it again"
        )
