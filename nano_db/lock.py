"""A lock that does not outlive its owner: one process at a time trains a block.

The operating system holds the lock (flock), not the file. When its owner ends, be it by SIGKILL or a power cut, the
lock is gone; the file that stays behind means nothing. Over NFS Linux passes flock on to the server, so machines that
share a folder see each other's locks. Windows has no flock, and some cluster file systems have it switched off: there
a warning says that nothing is locked, and that the user must see to it.
"""

import os
import platform
import sys
from contextlib import contextmanager, suppress

from nano_db.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def lock(path, purpose, wait=False):
    """Hold the lock file `path` while the context lasts. purpose: what it guards, like "block 2".

    Raises UsageError where another process holds it, and says which; with wait, waits for that process instead.
    """
    try:
        file = open(path, "a+")  # noqa: SIM115 - its closing is what frees the lock
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): choose another --out") from error
    with file:
        try:
            if fcntl is None:
                raise OSError(None, "Windows has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise UsageError(
                f"{purpose} is in the hands of {owner} (it holds {path}): wait for its end, or stop it, then run again"
            ) from None
        except OSError as error:
            print(
                f"warning: no locks here ({error.strerror}): see to it that no other process trains {purpose}",
                file=sys.stderr,
            )
        with suppress(OSError):  # on a full disk the owner remains unnamed
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
