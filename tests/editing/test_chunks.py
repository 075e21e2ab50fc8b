"""Parts that fit into memory, and what happens where they do not."""

import pytest
import torch

from editing.chunks import ChunkSize


class Narrow:
    """Runs out of memory on slices wider than `room`."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.seen: list[tuple[int, int]] = []

    def __call__(self, part: slice) -> int:
        width = part.stop - part.start
        self.seen.append((part.start, width))
        if width > self.room:
            raise torch.OutOfMemoryError("no room")
        return width


def test_parts_cover_every_row_once() -> None:
    run = Narrow(4)
    assert ChunkSize(4).split(10, run) == [4, 4, 2]
    assert run.seen == [(0, 4), (4, 4), (8, 2)]


def test_halves_where_memory_runs_out_and_stays_there() -> None:
    parts, run = ChunkSize(8), Narrow(3)
    assert sum(parts.split(11, run)) == 11
    assert run.seen == [(0, 8), (0, 4), (0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 1)]
    assert parts.size == 2
    again = Narrow(3)
    parts.split(4, again)
    assert again.seen == [(0, 2), (2, 2)]


def test_gives_up_where_one_row_finds_no_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        ChunkSize(4).split(4, Narrow(0))
