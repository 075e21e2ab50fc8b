"""Link files of the store into a folder, for libraries that read folders: pipelines and tokenizers."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from app.storage.store import Store


def snapshot(store: Store, files: Sequence[tuple[str, str]], *, folder: Path) -> Path:
    """Return a folder below `folder`/snapshots in which each (path, sha256) of `files` is a link to its blob.

    It is made once and found again by the digest of `files`. Every blob is verified each time. Raises `BlobMissing` or
    `BlobCorrupt`, and `ValueError` for a path outside of the folder.
    """
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files))
    home = folder.absolute() / "snapshots"
    target = home / hashlib.sha256(lines.encode()).hexdigest()
    paths = [_inside(path) for path, _ in files]
    if _is_whole(target, paths):
        for _, sha256 in files:
            store.fetch(sha256, recheck=False)
        return target
    home.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=home, prefix="building-"))
    try:
        building.chmod(0o755)
        for path, (_, sha256) in zip(paths, files, strict=True):
            link = building / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(store.fetch(sha256))
        _put_in_place(building, target, paths)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _put_in_place(building: Path, target: Path, paths: Sequence[PurePosixPath]) -> None:
    """Rename the folder unless another process was faster. Replaces a folder with broken links."""
    try:
        os.rename(building, target)
    except OSError:
        if _is_whole(target, paths):
            return
        broken = Path(tempfile.mkdtemp(dir=target.parent, prefix="broken-"))
        os.rename(target, broken)
        os.rename(building, target)
        shutil.rmtree(broken)


def _is_whole(target: Path, paths: Sequence[PurePosixPath]) -> bool:
    return target.is_dir() and all((target / path).is_file() for path in paths)


def _inside(path: str) -> PurePosixPath:
    relative = PurePosixPath(path)
    if relative.is_absolute() or not relative.parts or ".." in relative.parts or "\\" in path or "\0" in path:
        raise ValueError(f"{path!r} is not a path inside a model")
    return relative
