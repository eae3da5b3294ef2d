"""Memory of a rank: how much it took at most, and what is said when it could not have more."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

from solomonov.footprint import Footprint

GIB = 2**30
WORTH_FORESEEING = 10**7
"""Parameters from which the footprint is compared with what was measured: below, a process is mostly its libraries."""

_REFUSALS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


class PeakMemory:
    """The most memory that this rank has had since it was made.

    On a CUDA device: bytes of tensors there. On the CPU: resident bytes of the process beyond those at the start,
    so make it before the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._before = 0 if device.type == "cuda" else _status("VmRSS")

    def measured(self) -> int:
        """Bytes."""
        return max(0, peak_bytes(self._device) - self._before)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has had: tensors on a CUDA device, else all that was resident."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """A size of this process from /proc, in bytes; without /proc the most that it ever had."""
    path = Path("/proc/self/status")
    if not path.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def is_refusal(error: BaseException) -> bool:
    """Whether an allocation failed: on the device, or of torch or Python on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)


def describe(footprint: Footprint) -> str:
    """Its parts, in GiB."""
    parts = {
        "weights": footprint.weights,
        "gradients": footprint.gradients,
        "optimizer": footprint.optimizer,
        "buffers": footprint.buffers,
        "activations": footprint.activations,
    }
    words = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
    host = f"; {footprint.host / GIB:.3g} on the host" if footprint.host else ""
    return f"{footprint.total / GIB:.3g} GiB ({words}; in the {footprint.moment}{host})"
