"""The one exception that users are meant to see, and failures of the machine that deserve a line, too."""

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


def compiler_fault(error):
    """What torch.compile lacks on this machine, in words; "" for any other error."""
    message, first = str(error), str(error).partition("\n")[0]
    if isinstance(error, RuntimeError) and "torch.compile is not supported" in message:
        return first
    if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # importing it takes seconds
        return ""
    if "InvalidCxxCompiler" in message or "Compiler:" in message:
        return "there is no C++ compiler: install one (g++, clang++, on Windows cl), or name it in CXX"
    if "CppCompileError" in message:
        return "the C++ compiler fails, most likely for want of Python's header files (package python3-dev)"
    if "triton" in message.lower():
        return f"Triton is missing, or does not support this GPU ({first})"
    return ""
