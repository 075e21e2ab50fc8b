"""Run a network on as many rows at a time as fit into memory."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

CPU_ROWS = 32  # suits the CPU's caches
_TRIALS = (1, 3)  # rows of the runs that are measured
_SHARE = 0.8  # of the free memory; the allocator loses some of it to fragments
_MOST_ROWS = 256


class MemoryGauge(Protocol):
    """Measures the memory of a device, in bytes."""

    def reset(self) -> None:
        """Start a measurement."""
        ...

    def measure_peak(self) -> int:
        """Return the most memory in use since `reset`, less what was in use then."""
        ...

    def measure_free(self) -> int:
        """Return the memory that tensors can still take."""
        ...


class CudaMemory:
    """The memory of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def measure_peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def measure_free(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + cached


class ChunkSize:
    """The number of rows that a network takes at a time. It is halved for good whenever memory runs out.

    With a gauge it is measured instead of given: the first slices have 1 and 3 rows, and their peaks tell how many
    rows fit into the free memory. `save_memory` is called when not even one row fits. It changes the network so that
    it needs less memory, or returns False if it cannot.
    """

    def __init__(
        self, size: int = CPU_ROWS, *, gauge: MemoryGauge | None = None, save_memory: Callable[[], bool] | None = None
    ) -> None:
        self.size = size
        self._gauge = gauge
        self._save_memory = save_memory
        self._trials: tuple[int, ...] = ()
        self._peaks: list[int] = []
        self._start_trials()

    @classmethod
    def for_device(cls, device: torch.device, *, save_memory: Callable[[], bool] | None = None) -> "ChunkSize":
        """Return a size that is measured on a GPU, and suits the caches of a CPU."""
        return cls(gauge=CudaMemory(device) if device.type == "cuda" else None, save_memory=save_memory)

    def run_in_chunks(self, rows: int, run: Callable[[slice], T]) -> list[T]:
        """Call `run` with consecutive slices of 0 … rows-1 and return its results in order.

        A slice that runs out of memory is run again in halves, so `run` must have no effect where it fails. Raises
        `torch.OutOfMemoryError` if a single row does not fit.
        """
        results: list[T] = []
        start = 0
        while start < rows:
            chunk = slice(start, min(start + self.size, rows))
            try:
                results.append(self._run(chunk, run))
            except torch.OutOfMemoryError:
                if not self._shrink(chunk.stop - start):
                    raise
            else:
                start = chunk.stop
        return results

    def _run(self, chunk: slice, run: Callable[[slice], T]) -> T:
        if self._gauge is None or not self._trials or chunk.stop - chunk.start != self._trials[0]:
            return run(chunk)
        self._gauge.reset()
        result = run(chunk)
        self._peaks.append(self._gauge.measure_peak())
        self._trials = self._trials[1:]
        self.size = self._trials[0] if self._trials else self._choose_size()
        return result

    def _shrink(self, rows: int) -> bool:
        """Need less memory from now on than for this many rows. Return False if that is impossible."""
        if rows > 1:
            self.size, self._trials = rows // 2, ()
            return True
        if self._save_memory is None or not self._save_memory():
            return False
        self._start_trials()
        return True

    def _start_trials(self) -> None:
        self._peaks = []
        self._trials = _TRIALS if self._gauge else ()
        if self._trials:
            self.size = self._trials[0]

    def _choose_size(self) -> int:
        """Return the rows that fit: the peak is a constant and so much for each row."""
        assert self._gauge
        (few, many), (small, large) = _TRIALS, self._peaks
        row = max(1, (large - small) // (many - few))
        constant = max(0, small - few * row)
        return int(max(many, min(_MOST_ROWS, (_SHARE * self._gauge.measure_free() - constant) // row)))
