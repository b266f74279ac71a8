"""The one exception a user is meant to see."""


class UsageError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and how to mend it.

    The scripts print it without a traceback and exit with code 2 (machinery/run.py: `command`).
    """
