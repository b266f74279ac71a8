"""How a command prints and ends: its output can be shown anywhere, and an error that a user can fix is one line."""

import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from nano_db.errors import UsageError, compiler_fault, is_out_of_memory


class Screen:
    """stdout or stderr as a stream that never raises. Characters that its encoding lacks become escapes such as
    \\u65e5. When nobody is reading (a closed pipe, a full disk), the rest is dropped, and the command continues.
    """

    def __init__(self, stream):
        self.stream, self.gone = stream, False

    def __getattr__(self, name):  # encoding, isatty, ...
        return getattr(self.stream, name)

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, work, *args):
        if self.gone:
            return
        try:
            work(*args)
        except BlockingIOError:  # the reader is slow: this piece is lost
            pass
        except (OSError, ValueError):  # ValueError: it has been closed
            self.gone = True
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # where its buffer goes when Python ends


def command(main):
    """Run a script's main: a UsageError gives one line on stderr and exit code 2, an interruption one line and 130."""
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if stream is not None:  # a program without a console, such as pythonw, has none
                screen = Screen(stream)
                stack.enter_context(redirect(screen))
                stack.callback(screen.flush)
        try:
            main()
        except Exception as error:
            if is_out_of_memory(error):
                advice = "try --checkpoint-activations, a smaller --batch-size or, in blocks, more --blocks"
                error = UsageError(f"out of memory: {advice}; what was saved is untouched")
            elif fault := compiler_fault(error):
                error = UsageError(f"--compile: {fault}; without --compile the same run trains, only slower")
            if not isinstance(error, UsageError):
                raise
            path = Path(sys.argv[0])  # for a package it is __main__.py
            name, line = path.parent.name if path.stem == "__main__" else path.name, " ".join(str(error).splitlines())
            print(f"{name}: error: {line}", file=sys.stderr)  # one line, even if a file name contains a line break
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print(
                f"\nstopped; {str(stop) or 'what had been saved is kept: repeat the command to go on'}", file=sys.stderr
            )
            sys.exit(130)
