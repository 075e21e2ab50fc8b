"""The stored form of caption lists: text with one caption per line."""

from collections.abc import Iterable


def pack_captions(captions: Iterable[str], *, samples: int) -> tuple[bytes, int]:
    """Return the first `samples` captions that are not blank as UTF-8 text, and their number.

    Each caption is one line with single spaces, so `content.decode().splitlines()` returns them.
    """
    lines: list[str] = []
    for caption in captions:
        if line := " ".join(caption.split()):
            lines.append(line + "\n")
        if len(lines) == samples:
            break
    return "".join(lines).encode(), len(lines)
