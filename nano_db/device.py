"""Where a step is computed, and in which precision."""

import os
from contextlib import nullcontext

import torch

from nano_db.errors import UsageError


def pick_device(name):
    """The device that --device names: auto takes CUDA where there is one. Raises UsageError where it is absent.

    Of the processes that torchrun starts on one machine, each gets a GPU of its own, as far as they go.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is at hand; use --device cpu (or auto)")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: no Metal device is at hand; use --device cpu (or auto)")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return name


def autocast(settings, device):
    """The context that a step computes in: bfloat16 where asked for, or by default on CUDA."""
    wants = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device == "cuda")
    return torch.autocast(device, torch.bfloat16) if wants else nullcontext()
