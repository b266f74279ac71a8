"""text8: the first 10^8 characters of a cleaned English Wikipedia of 2006, in a-z and space (M. Mahoney)."""

import hashlib
import zipfile
from pathlib import Path

from data.download import fetch
from nano_db.errors import UsageError

URL = "https://mattmahoney.net/dc/text8.zip"
SHA256 = "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"
ZIP_SIZE = 31_344_016  # bytes
MD5 = "3bea1919949baf155f99411df5fada7e"  # of the text
SIZE = 100_000_000
TRAIN, VALIDATION = (
    90_000_000,
    5_000_000,
)  # characters, the usual split; the last 5,000,000 are a test set, not touched here
SYMBOLS = set("abcdefghijklmnopqrstuvwxyz ")


def text(folder):
    """The text, from `folder`/text8 or `folder`/text8.zip; the archive is downloaded if neither is there."""
    unpacked = Path(folder) / "text8"
    if unpacked.exists():
        source = unpacked
        try:
            content = unpacked.read_bytes()
        except OSError as error:
            raise UsageError(f"{source} cannot be read ({error.strerror})") from error
    else:
        source = fetch(URL, Path(folder) / "text8.zip", SHA256, ZIP_SIZE)
        with zipfile.ZipFile(source) as archive:
            content = archive.read("text8")
    characters = content.decode("latin-1")
    others = sorted(set(characters) - SYMBOLS)
    if others:
        raise UsageError(f"{source} has characters other than a-z and space: {' '.join(map(repr, others[:10]))}")
    if len(content) != SIZE or hashlib.md5(content).hexdigest() != MD5:
        raise UsageError(f"{source} is not text8 (its checksum differs): delete it to download it again")
    return characters
