"""Run a network on as many rows at a time as fit into memory."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class ChunkSize:
    """The number of rows that a network takes at a time. It is halved for good whenever memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

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
                results.append(run(chunk))
            except torch.OutOfMemoryError:
                if chunk.stop - start == 1:
                    raise
                self.size = (chunk.stop - start) // 2
            else:
                start = chunk.stop
        return results
