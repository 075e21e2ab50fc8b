"""What lies directly in EMENDER_MODEL_ROOTS. Names are compared with a listing; no path is built from a client's."""

from collections.abc import Iterator, Sequence
from pathlib import Path


def find_folder(roots: Sequence[Path], name: str) -> Path | None:
    """The folder `name` directly in one of the roots."""
    return next((entry for entry in _entries(roots) if entry.name == name and entry.is_dir()), None)


def find_captions(roots: Sequence[Path], name: str) -> Path | None:
    """The file `<name>.txt` directly in one of the roots."""
    return next((entry for entry in _entries(roots) if entry.name == f"{name}.txt" and entry.is_file()), None)


def _entries(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        if root.is_dir():
            yield from sorted(root.iterdir())
