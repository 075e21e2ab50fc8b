"""What lies between two versions: edits, files, and how far each tensor of the text encoders and the U-Net moved."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from sqlalchemy.orm import Session

from app.checkpoints import queries
from app.checkpoints.errors import FileUnreadable
from app.checkpoints.publish import EDITABLE
from app.checkpoints.service import edits_out, find_checkpoint, find_model, require_served
from app.db.models import Checkpoint, Model
from app.storage.store import BlobCorrupt, BlobMissing, Store
from emender.schemas.checkpoints import DifferenceOut, EditInCheckpoint, FileDifference, LayerDifference

BASE = "base"
LAYER = re.compile(r"\.layers\.(\d+)\.")


def difference(session: Session, *, store: Store, model_name: str, revision: str, against: str) -> DifferenceOut:
    """`revision` as seen from `against`, a version, an alias or "base". Both must be served."""
    model = find_model(session, name=model_name)
    checkpoint = find_checkpoint(session, model=model, revision=revision)
    require_served(checkpoint)
    other = None
    if against != BASE:
        other = find_checkpoint(session, model=model, revision=against)
        require_served(other)
    base = _base_files(session, model=model)
    files, other_files = _own_files(checkpoint), _own_files(other) if other else {}
    here, there = base | files, base | other_files
    edits, other_edits = _edits(session, checkpoint), _edits(session, other) if other else {}
    return DifferenceOut(
        version=f"v{checkpoint.number}",
        against=f"v{other.number}" if other else BASE,
        added=[edit for edit_id, edit in edits.items() if edit_id not in other_edits],
        removed=[edit for edit_id, edit in other_edits.items() if edit_id not in edits],
        layers=_layers(store, edited=files.keys() | other_files.keys(), here=here, there=there),
        files=_files(here, there),
    )


def tensor_changes(path: Path, against: Path) -> Iterable[tuple[str, float]]:
    """Each tensor that differs between two weight files and ‖W - W_against‖ / ‖W_against‖, pair after pair.

    Keys are compared without the prefix `text_model.`, which some base files lack.
    """
    with safe_open(path, framework="np") as one, safe_open(against, framework="np") as two:
        names = {key.removeprefix("text_model."): key for key in two.keys()}
        for key in sorted(one.keys(), key=_natural):
            other = names.get(key.removeprefix("text_model."))
            if other is None:
                continue
            w, v = one.get_tensor(key), two.get_tensor(other)
            if w.shape == v.shape and np.array_equal(w, v):
                continue
            w, v = w.astype(np.float64), v.astype(np.float64)
            yield key, float(np.linalg.norm(w - v) / max(float(np.linalg.norm(v)), 1e-300))


def _layers(
    store: Store, *, edited: Iterable[str], here: Mapping[str, str], there: Mapping[str, str]
) -> list[LayerDifference]:
    changed = []
    for path in sorted(edited):
        now, against = here.get(path), there.get(path)
        weights = path.startswith(EDITABLE) and path.endswith(".safetensors")
        if not weights or now is None or against is None or now == against:
            continue
        for key, norm in tensor_changes(_verified(store, path, now), _verified(store, path, against)):
            layer = LAYER.search(key)
            number = int(layer[1]) if layer else None
            changed.append(LayerDifference(path=path, tensor=key, layer=number, relative_norm=norm))
    return changed


def _files(here: Mapping[str, str], there: Mapping[str, str]) -> list[FileDifference]:
    found = []
    for path in sorted(here.keys() | there.keys()):
        now, before = here.get(path), there.get(path)
        if now != before:
            change = "added" if before is None else "removed" if now is None else "changed"
            found.append(FileDifference(path=path, change=change, sha256=now, against_sha256=before))
    return found


def _verified(store: Store, path: str, sha256: str) -> Path:
    try:
        return store.fetch(sha256)
    except (BlobMissing, BlobCorrupt):
        raise FileUnreadable(f"{path} is damaged or missing in the store: restore the blob {sha256}.") from None


def _base_files(session: Session, *, model: Model) -> dict[str, str]:
    return {file.path: file.sha256 for file in queries.model_files(session, model_id=model.id)}


def _own_files(checkpoint: Checkpoint) -> dict[str, str]:
    return {file.path: file.sha256 for file in checkpoint.files}


def _edits(session: Session, checkpoint: Checkpoint) -> dict[object, EditInCheckpoint]:
    return {edit.id: edit for edit in edits_out(session, checkpoint=checkpoint)}


def _natural(key: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
