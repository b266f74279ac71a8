"""The one exception that users are meant to see, and machine failures that also get a one-line message."""

import torch


class UsageError(Exception):
    """Something the user can fix. The message is one line: what is wrong, and how to fix it. Scripts print it without a
    traceback and exit with code 2.
    """


def is_out_of_memory(error):
    """Whether an allocator failed: the GPU's, Python's, or those of the CPU, mmap and the CUDA libraries, which raise a
    plain RuntimeError.
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
        return "there is no C++ compiler: install one (g++, clang++, or cl on Windows), or set CXX to it"
    if "CppCompileError" in message:
        return "the C++ compiler fails, most likely because Python's header files are missing (package python3-dev)"
    if "triton" in message.lower():
        return f"Triton is missing, or does not support this GPU ({first})"
    return ""
