"""The stored form of caption lists: text with one caption per line."""

from collections.abc import Iterable

MAX_CHARACTERS = 100_000
"""More than any tokenizer reads. It bounds the time that a caption without spaces takes."""


def pack_captions(captions: Iterable[str], *, samples: int) -> tuple[bytes, int]:
    """Return the first `samples` captions that are not blank as UTF-8 text, and their number.

    Each caption is one line with single spaces and at most `MAX_CHARACTERS`:
    `content.decode().splitlines()` returns them.
    """
    lines: list[str] = []
    for caption in captions:
        if line := " ".join(caption.split()):
            lines.append(line[:MAX_CHARACTERS] + "\n")
        if len(lines) == samples:
            break
    return "".join(lines).encode(), len(lines)
