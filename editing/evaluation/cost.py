"""What a piece of work takes: wall seconds, and the most memory held meanwhile."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


@dataclass
class Cost:
    """Filled in when the `with` block of `measured` ends."""

    seconds: float = 0.0
    peak_mb: float = 0.0
    """The most held meanwhile, the model with it: of the GPU's memory where there is one, else of this process."""


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    cost = Cost()
    _forget_peak(device)
    start = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - start
    cost.peak_mb = _peak_bytes(device) / 1e6


def _forget_peak(device: torch.device) -> None:
    """Let the peak be what is held now, where the system can forget one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (_PROCESS / "status").exists():
        lines = (_PROCESS / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes where there is no /proc, that is on a Mac
