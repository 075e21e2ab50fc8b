"""The files that a checkpoint serves: its own over those of its base model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy.orm import Session

from app.checkpoints import queries
from app.db.models import Checkpoint, Model
from app.storage.store import Store
from editing.families.registry import FAMILIES
from editing.files import File

WEIGHTS = re.compile(r".*\.safetensors(\.index(\.\w+)?\.json)?")
EDITABLE = tuple(sorted({f"{name}/" for family in FAMILIES.values() for name in family.edited_components}))
"""The folders of the components that edits are written into."""
MAX_CACHED_LISTINGS = 256

_listings: dict[str, Mapping[str, File]] = {}
"""The files of published commits by path. A commit is a digest of them, so a listing never changes."""


@dataclass(frozen=True)
class Revision:
    """A published checkpoint and every file that it serves, by path."""

    version: str
    commit: str
    published_at: datetime
    files: Mapping[str, File]


def read_revision(session: Session, *, model: Model, revision: str) -> Revision:
    """Return what a revision serves.

    The database resolves the revision each time, so moved aliases and retractions take effect at once. Raises
    `CheckpointNotFound`, `CheckpointNotPublished` or `CheckpointRetracted`.
    """
    checkpoint = queries.get_published_checkpoint(session, model=model, revision=revision)
    assert checkpoint.commit is not None and checkpoint.published_at is not None
    files = list_served_files(checkpoint)
    return Revision(checkpoint.version, checkpoint.commit, checkpoint.published_at, files)


def list_revisions(session: Session, *, model: Model) -> tuple[dict[str, str], dict[str, str]]:
    """Return the commits of a model's published checkpoints by alias, `main` included, and by version."""
    query = queries.select_checkpoints(model.id).where(Checkpoint.state == "published").order_by(Checkpoint.number)
    published = {row.id: row for row in session.scalars(query)}
    aliases = {row.name: row.checkpoint_id for row in queries.list_aliases(session, model_id=model.id)}
    if main := queries.find_checkpoint(session, model=model, revision=queries.MAIN):
        aliases = {queries.MAIN: main.id, **aliases}
    by_alias = {name: published[row_id].commit or "" for name, row_id in aliases.items() if row_id in published}
    return by_alias, {row.version: row.commit or "" for row in published.values()}


def list_served_files(checkpoint: Checkpoint) -> Mapping[str, File]:
    """Return the files of a published checkpoint by path, from the cache if its commit was listed before."""
    assert checkpoint.commit is not None
    files = _listings.get(checkpoint.commit)
    if files is None:
        files = merge_files(list_files(checkpoint.model), list_files(checkpoint))
        if len(_listings) >= MAX_CACHED_LISTINGS:
            _listings.clear()
        _listings[checkpoint.commit] = files
    return files


def merge_files(base: Iterable[File], own: Iterable[File]) -> dict[str, File]:
    """Return a checkpoint's own files over those of the base model, by path.

    An edited component serves the edited weights only. A loader that asks for another variant of them
    (`model.fp16.safetensors`) finds none instead of the unedited one.
    """
    own = list(own)
    edited = {file.path.partition("/")[0] for file in own if file.path.startswith(EDITABLE)}
    kept = (file for file in base if file.path.partition("/")[0] not in edited or not WEIGHTS.fullmatch(file.path))
    return dict(sorted({file.path: file for file in (*kept, *own)}.items()))


def list_files(owner: Model | Checkpoint) -> list[File]:
    """Return the files of a model, or those that a checkpoint has besides its model's."""
    return [File(row.path, row.sha256, row.size) for row in owner.files]


def store_folder(store: Store, folder: Path) -> list[File]:
    """Put every file below the folder into the store."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [File(path.relative_to(folder).as_posix(), store.put_file(path), path.stat().st_size) for path in paths]


def store_content(store: Store, path: str, content: bytes) -> File:
    """Put one file into the store."""
    return File(path, store.put(content), len(content))
