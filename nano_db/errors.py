"""The one exception that users are meant to see, and the one failure that is not their fault."""

import torch


class UsageError(Exception):
    """Something the user can fix. The message is one line: what is wrong, and how to fix it. Scripts print it without a
    traceback and exit with code 2.
    """


def is_out_of_memory(error):
    """Whether an allocator gave up: a GPU's, Python's, or the CPU's, mmap's and CUDA's libraries', which raise a plain
    RuntimeError.
    """
    said = any(words in str(error) for words in ("allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED"))
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or said
