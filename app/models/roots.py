"""What lies directly in EMENDER_MODEL_ROOTS. Names are compared with a listing; no path is built from a client's, and
no link leads out of the roots."""

from collections.abc import Iterator, Sequence
from pathlib import Path


def find_folder(roots: Sequence[Path], name: str) -> Path | None:
    """The folder `name` directly in one of the roots."""
    return next((entry for entry in _entries(roots) if entry.name == name and entry.is_dir()), None)


def find_captions(roots: Sequence[Path], name: str) -> Path | None:
    """The file `<name>.txt` directly in one of the roots."""
    return next((entry for entry in _entries(roots) if entry.name == f"{name}.txt" and entry.is_file()), None)


def leads_out(roots: Sequence[Path], folder: Path) -> Path | None:
    """The first link in or below the folder that leads out of all roots."""
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
