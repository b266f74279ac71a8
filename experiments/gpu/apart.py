"""Work in a process of its own: a CUDA error ruins its process, and a process that hangs can only be killed."""

import faulthandler
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import wait

import torch

from experiments.gpu.cases import one_line
from nano_db import __version__

# A forked process need not import again, but CUDA must not be initialised before the fork: the command never does so.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
PATIENCE = 10  # seconds to wait for a process that was killed


def found_by(work, options):
    """Yield what work(options) yields in a process of its own, for options.seconds at most. Raises TimeoutError, or
    RuntimeError if the process dies.
    """
    end, (ours, theirs) = time.monotonic() + options.seconds, PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work_apart, args=(work, options, theirs))
    process.start()
    theirs.close()
    try:
        while wait([ours, process.sentinel], max(0.0, end - time.monotonic())):
            try:
                found = ours.recv() if ours.poll() else None
            except (EOFError, OSError):  # it died while sending
                found = None
            if found is None:
                process.join(PATIENCE)
                if process.exitcode:
                    raise RuntimeError(f"its process {death_of(process.exitcode)}: see log.txt")
                return
            yield found
        raise TimeoutError
    finally:
        if hasattr(os, "killpg"):
            with suppress(OSError):  # it is gone already
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.kill()
        process.join(PATIENCE)
        ours.close()


def death_of(code):
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def work_apart(work, options, connection):
    """In that process: send what work(options) yields. What is printed goes into log.txt."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, which Ctrl-C does not reach
    threading.Thread(target=end_with_parent, daemon=True).start()
    if options.preset == "tiny":
        torch.set_num_threads(1)  # its tensors are small: more threads only wait for each other
    log = open(options.out / "log.txt", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - until the process ends
    faulthandler.enable(log)
    for stream in (1, 2):  # of compilers, too
        os.dup2(log.fileno(), stream)
    with redirect_stdout(log), redirect_stderr(log), connection:
        try:
            for found in work(options):
                print(f"\n--- {found}")
                connection.send(found)
                if isinstance(found, dict) and is_unusable(found.get("said", "")):
                    raise RuntimeError("the rest was left out: after a CUDA error a process cannot continue")
        except Exception as error:
            traceback.print_exc()
            connection.send({"passed": False, "said": one_line(error)})


def is_unusable(said):
    """Whether CUDA repeats this error on every later call. (A cuBLAS status does not, despite its name.)"""
    return "CUDA error" in said and "CUBLAS_STATUS" not in said


def end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # with all that this process has started
    os._exit(1)


def describe(options):
    """Yield {"device": its name}, and what else a reader of the report must know; or why there is no GPU."""
    if options.device == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            found = torch.cuda.is_available()
        if not found:
            built = "" if torch.version.cuda else " (this PyTorch is built without CUDA)"
            reasons = "".join(f" ({str(warning.message).splitlines()[0]})" for warning in caught)
            yield {"said": f"PyTorch {torch.__version__} finds no CUDA device{built}{reasons}"}
            return
        text = torch.cuda.get_device_name()
        with suppress(Exception):  # of a device that is not quite a GPU, less is known
            about = torch.cuda.get_device_properties(0)
            text += f" ({about.total_memory / 2**30:.1f} GiB, compute capability {about.major}.{about.minor})"
        yield {"device": text}
        with suppress(OSError, subprocess.SubprocessError, IndexError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            yield {"driver": f"driver {found.split()[0]}"}
    else:
        yield {"device": f"a CPU ({platform.machine()})"}
    yield {"torch": f"PyTorch {torch.__version__}" + (f" (CUDA {torch.version.cuda})" if torch.version.cuda else "")}
    yield {"host": f"Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} CPU cores"}
    yield {"version": f"nano_db {__version__}", "date": time.strftime("%Y-%m-%d %H:%M")}
