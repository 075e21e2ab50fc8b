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


class ScriptedGauge:
    """A device where a run takes 10 bytes and 7 for each row, and 100 are free."""

    def __init__(self, run: LimitedMemory) -> None:
        self.run = run

    def reset(self) -> None:
        self.start = len(self.run.calls)

    def measure_peak(self) -> int:
        return 10 + 7 * max(width for _, width in self.run.calls[self.start :])

    def measure_free(self) -> int:
        return 100


def test_size_is_measured_in_two_trials() -> None:
    run = LimitedMemory(64)
    chunks = ChunkSize(gauge=ScriptedGauge(run))
    assert sum(chunks.run_in_chunks(30, run)) == 30
    assert run.calls == [(0, 1), (1, 3), (4, 10), (14, 10), (24, 6)]  # 10 + 7 · 10 ≤ 80, four fifths of the free bytes


def test_trial_waits_for_enough_rows() -> None:
    run = LimitedMemory(64)
    chunks = ChunkSize(gauge=ScriptedGauge(run))
    for rows in (1, 2, 2, 8):
        chunks.run_in_chunks(rows, run)
    assert run.calls == [(0, 1), (0, 2), (0, 2), (0, 3), (3, 5)]
    assert chunks.size == 10


def test_trial_that_does_not_fit_decides_the_size() -> None:
    run = LimitedMemory(2)
    chunks = ChunkSize(gauge=ScriptedGauge(run))
    assert sum(chunks.run_in_chunks(5, run)) == 5
    assert chunks.size == 1


def test_memory_is_saved_when_not_even_one_row_fits() -> None:
    run = LimitedMemory(0)

    def save_memory() -> bool:
        was, run.limit = run.limit, 4
        return was == 0

    chunks = ChunkSize(gauge=ScriptedGauge(run), save_memory=save_memory)
    assert sum(chunks.run_in_chunks(9, run)) == 9
    assert run.calls == [(0, 1), (0, 1), (1, 3), (4, 5), (4, 2), (6, 2), (8, 1)]
    run.limit = 0
    run.calls.clear()
    with pytest.raises(torch.OutOfMemoryError):  # it was saved before
        chunks.run_in_chunks(1, lambda part: LimitedMemory(-1)(part))
