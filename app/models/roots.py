"""Find folders and caption lists directly below EMENDER_MODEL_ROOTS.

Names are compared with a listing: no path is built from a client's string, and no link outside the roots is followed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path


def find_folder(roots: Sequence[Path], name: str) -> Path | None:
    """Return the folder `name` directly below one of the roots."""
    return next((entry for entry in _entries(roots) if entry.name == name and entry.is_dir()), None)


def find_captions(roots: Sequence[Path], name: str) -> Path | None:
    """Return the file `<name>.txt` directly below one of the roots."""
    return next((entry for entry in _entries(roots) if entry.name == f"{name}.txt" and entry.is_file()), None)


def find_outside_link(roots: Sequence[Path], folder: Path) -> Path | None:
    """Return the first symbolic link in the folder whose target is outside all roots."""
    links = (path for path in sorted(folder.rglob("*")) if path.is_symlink())
    return next((link for link in links if not _inside(roots, link)), None)


def _entries(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        if root.is_dir():
            yield from (entry for entry in sorted(root.iterdir()) if _inside(roots, entry))


def _inside(roots: Sequence[Path], path: Path) -> bool:
    try:
        place = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    return any(place.is_relative_to(root.resolve()) for root in roots)
