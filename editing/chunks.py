"""How much goes through a network at a time: as much as memory has room for, and half of it where it had not."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class ChunkSize:
    """How many rows a network takes at a time. It is halved whenever memory runs out, and stays so."""

    def __init__(self, size: int) -> None:
        self.size = size

    def split(self, rows: int, run: Callable[[slice], T]) -> list[T]:
        """`run` on slices of 0 … rows-1, in order. A slice that finds no memory is run again in halves, so `run` must
        leave nothing behind where it fails. Raises `torch.OutOfMemoryError` where one row alone finds none."""
        results: list[T] = []
        start = 0
        while start < rows:
            part = slice(start, min(start + self.size, rows))
            try:
                results.append(run(part))
            except torch.OutOfMemoryError:
                if part.stop - start == 1:
                    raise
                self.size = (part.stop - start) // 2
            else:
                start = part.stop
        return results
