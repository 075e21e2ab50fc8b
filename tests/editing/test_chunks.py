"""Chunks that fit into memory, and what happens if they do not."""

import pytest
import torch

from editing.chunks import ChunkSize


class LimitedMemory:
    """Runs out of memory on slices of more than `limit` rows."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls: list[tuple[int, int]] = []

    def __call__(self, part: slice) -> int:
        width = part.stop - part.start
        self.calls.append((part.start, width))
        if width > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return width


def test_chunks_cover_every_row_once() -> None:
    run = LimitedMemory(4)
    assert ChunkSize(4).run_in_chunks(10, run) == [4, 4, 2]
    assert run.calls == [(0, 4), (4, 4), (8, 2)]


def test_chunk_size_is_halved_for_good_when_memory_runs_out() -> None:
    chunks, run = ChunkSize(8), LimitedMemory(3)
    assert sum(chunks.run_in_chunks(11, run)) == 11
    assert run.calls == [(0, 8), (0, 4), (0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 1)]
    assert chunks.size == 2
    again = LimitedMemory(3)
    chunks.run_in_chunks(4, again)
    assert again.calls == [(0, 2), (2, 2)]


def test_error_is_raised_if_one_row_does_not_fit() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        ChunkSize(4).run_in_chunks(4, LimitedMemory(0))
