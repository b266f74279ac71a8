"""Fetch one file over https, once, and trust it only by its checksum."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from nano_db.errors import UsageError


def fetch(url, path, sha256, size):
    """Return `path`, downloaded from `url` if it is not there yet; whichever way, its content has this sha256.

    size: bytes expected; a longer answer is cut off. Raises UsageError without network or with a wrong checksum.
    """
    path = Path(path)
    if path.exists():
        _check(path, path.read_bytes(), sha256)
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
    _check(url, content, sha256)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): choose another --data-dir") from error
    return path


def _check(source, content, sha256):
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UsageError(
            f"{source} has sha256 {found[:16]}..., not the expected {sha256[:16]}...: "
            "delete the file to download it again, or name a file of your own with --data PATH"
        )
