"""Caption lists as the store keeps them: a text of one caption a line."""

from collections.abc import Iterable


def pack(captions: Iterable[str], *, samples: int) -> tuple[bytes, int]:
    """The first `samples` captions that are not blank, and how many they are.

    Each is one line of UTF-8 with single spaces, so that `content.decode().splitlines()` gives them back.
    """
    lines: list[str] = []
    for caption in captions:
        if line := " ".join(caption.split()):
            lines.append(line + "\n")
        if len(lines) == samples:
            break
    return "".join(lines).encode(), len(lines)
