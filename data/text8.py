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
TRAIN, VALIDATION = 90_000_000, 5_000_000  # characters: the usual split. The last 5,000,000 are not touched here


def text(folder):
    """(the first 95% of the text, the number of training characters), from `folder`/text8 or `folder`/text8.zip; the
    archive is downloaded if neither is there.
    """
    source = Path(folder) / "text8"
    try:
        if source.exists():
            content = source.read_bytes()
        else:
            source = fetch(URL, Path(folder) / "text8.zip", SHA256, ZIP_SIZE)
            with zipfile.ZipFile(source) as archive:
                content = archive.read("text8")
    except OSError as error:
        raise UsageError(f"{source} cannot be read ({error.strerror})") from error
    if len(content) != SIZE or hashlib.md5(content).hexdigest() != MD5:
        raise UsageError(f"{source} is not text8 (its checksum differs): delete it to download it again")
    return content[: TRAIN + VALIDATION].decode("latin-1"), TRAIN
