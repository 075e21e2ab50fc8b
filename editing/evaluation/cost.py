"""Measure what a piece of work costs: wall seconds and peak memory."""

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
    """The cost of a `with` block of `measure_cost`, once it has ended."""

    seconds: float = 0.0
    peak_mb: float = 0.0
    """Peak memory with the model: of the GPU if there is one, else of this process."""


@contextmanager
def measure_cost(device: torch.device) -> Iterator[Cost]:
    """Measure the block. The cost is filled in when it ends."""
    cost = Cost()
    _reset_peak(device)
    start = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - start
    cost.peak_mb = _read_peak(device) / 1e6


def _reset_peak(device: torch.device) -> None:
    """Reset the peak to the current memory, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")


def _read_peak(device: torch.device) -> int:
    """Return the peak memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (_PROCESS / "status").exists():
        lines = (_PROCESS / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # without /proc, on macOS, it is in bytes
