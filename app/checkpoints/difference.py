"""Compare two checkpoints: their edits, their files, and how far each tensor of their weights moved."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from app.checkpoints.files import EDITABLE, list_files, list_served_files
from app.checkpoints.queries import get_published_checkpoint
from app.checkpoints.service import edits_out
from app.models.queries import get_model
from app.problems import FileUnreadable
from app.storage.store import BlobCorrupt, BlobMissing, Store
from editing.changes import find_changed_tensors
from editing.files import File
from emender.schemas.checkpoints import DifferenceOut, FileDifference, LayerDifference

BASE = "base"


def compare(session: Session, *, store: Store, model_name: str, revision: str, against: str) -> DifferenceOut:
    """Compare a published checkpoint with another one, or with the base model if `against` is "base"."""
    model = get_model(session, name=model_name)
    checkpoint = get_published_checkpoint(session, model=model, revision=revision)
    other = get_published_checkpoint(session, model=model, revision=against) if against != BASE else None
    files = list_served_files(checkpoint)
    other_files = list_served_files(other) if other else {file.path: file for file in list_files(model)}
    edited = {file.path for side in (checkpoint, other) if side for file in list_files(side)}
    edits = {edit.id: edit for edit in edits_out(session, checkpoint=checkpoint)}
    other_edits = {edit.id: edit for edit in edits_out(session, checkpoint=other)} if other else {}
    return DifferenceOut(
        version=checkpoint.version,
        against=other.version if other else BASE,
        added=[edit for edit_id, edit in edits.items() if edit_id not in other_edits],
        removed=[edit for edit_id, edit in other_edits.items() if edit_id not in edits],
        layers=_compare_weights(store, edited, files, other_files),
        files=_compare_files(files, other_files),
    )


def _compare_weights(
    store: Store, edited: Iterable[str], files: Mapping[str, File], other_files: Mapping[str, File]
) -> list[LayerDifference]:
    changes = []
    for path in sorted(edited):
        file, other = files.get(path), other_files.get(path)
        if path.startswith(EDITABLE) and path.endswith(".safetensors") and file and other and file != other:
            found = find_changed_tensors(_fetch(store, file), _fetch(store, other))
            changes += [LayerDifference(path=path, **vars(change)) for change in found]
    return changes


def _compare_files(files: Mapping[str, File], other_files: Mapping[str, File]) -> list[FileDifference]:
    changes = []
    for path in sorted(files.keys() | other_files.keys()):
        sha256, other = (side[path].sha256 if path in side else None for side in (files, other_files))
        if sha256 != other:
            change = "added" if other is None else "removed" if sha256 is None else "changed"
            changes.append(FileDifference(path=path, change=change, sha256=sha256, against_sha256=other))
    return changes


def _fetch(store: Store, file: File) -> Path:
    try:
        return store.fetch(file.sha256)
    except (BlobMissing, BlobCorrupt):
        raise FileUnreadable(
            f"{file.path} is damaged or missing in the store. Restore the blob {file.sha256}."
        ) from None
