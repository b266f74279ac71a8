"""The source code of Python's own standard library, some 9.5 million characters. No network needed.

The library differs between versions of Python (that of 3.11 has 9.4 million characters, 96 of them distinct, in 573
files), and a little between distributors. Scores from different versions cannot be compared to the last digit; the
checksum of the text is written to the run's config.json.
"""

import functools
import hashlib
import sysconfig
from pathlib import Path

from nano_db.errors import UsageError

# Tests are a different kind of code; tables are machine-generated; installed packages are not part of the library.
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "turtledemo", "site-packages", "dist-packages"}
MADE_ON_INSTALLING = ("_sysconfigdata", "config-")  # prefixes of names
HELD_OUT = 0.9  # a file is held out if its checksum, scaled to [0, 1), is at least this


@functools.lru_cache(maxsize=1)  # a process may train several times
def text(folder=None):
    """(all files, one after the other; the number of training characters). folder: not needed.

    The checksum of a file's path decides its place in the text, and so its side: held-out text is from other modules
    than training text, and a file is on the same side in every version of Python. Files that are not ASCII are skipped.
    Raises UsageError if this Python comes without the source code of its library.
    """
    root, files = Path(sysconfig.get_path("stdlib")), []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not LEFT_OUT.intersection(name.parts) and not name.parts[0].startswith(MADE_ON_INSTALLING):
            place = int(hashlib.sha256(name.as_posix().encode()).hexdigest()[:8], 16) / 2**32
            content = path.read_bytes()
            if content.isascii():
                files.append((place, content.decode("ascii").replace("\r\n", "\n")))
    files.sort()
    train = sum(len(content) for place, content in files if place < HELD_OUT)
    whole = "".join(content for _, content in files)
    if not 0 < train < len(whole):
        raise UsageError(f"--data python: this Python has no source code of its library in {root}; use --data pydocs")
    return whole, train
