"""Compare two checkpoints: their edits, their files, and how far each tensor of their weights moved."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from sqlalchemy.orm import Session

from app.checkpoints.files import EDITABLE, list_files, list_served_files
from app.checkpoints.queries import get_published_checkpoint
from app.checkpoints.service import edits_out
from app.models.queries import get_model
from app.problems import FileUnreadable
from app.storage.store import BlobCorrupt, BlobMissing, Store
from editing.files import File
from emender.schemas.checkpoints import DifferenceOut, FileDifference, LayerDifference

BASE = "base"
LAYER = re.compile(r"(?:^|\.)(?:layers|block)\.(\d+)\.")


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


def tensor_changes(path: Path, against: Path) -> Iterable[tuple[str, float]]:
    """Yield each tensor that differs between two weight files, with ‖W - W_against‖ / ‖W_against‖.

    Keys are compared without the prefix `text_model.`, which some base files lack.
    """
    one, two = _map_tensors(path), _map_tensors(against)
    names = {key.removeprefix("text_model."): key for key in two}
    for key in sorted(one, key=_natural_order):
        (dtype, w), (other_dtype, v) = one[key], two.get(names.get(key.removeprefix("text_model."), ""), one[key])
        if dtype == other_dtype and np.array_equal(w, v):
            continue
        w, v = _read_floats(w, dtype), _read_floats(v, other_dtype)
        yield key, float(np.linalg.norm(w - v) / max(float(np.linalg.norm(v)), 1e-300))


def _map_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return the dtype and the bytes of each tensor in a safetensors file. They are read when they are used."""
    content = np.memmap(path, mode="r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    return {
        key: (entry["dtype"], content[start:][slice(*entry["data_offsets"])])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _read_floats(content: np.ndarray, dtype: str) -> np.ndarray:
    """Return a tensor's numbers as float64. numpy has no bfloat16: it is the upper half of a float32."""
    if dtype == "BF16":
        return (content.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return content.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def _compare_weights(
    store: Store, edited: Iterable[str], files: Mapping[str, File], other_files: Mapping[str, File]
) -> list[LayerDifference]:
    changes = []
    for path in sorted(edited):
        file, other = files.get(path), other_files.get(path)
        is_weights = path.startswith(EDITABLE) and path.endswith(".safetensors")
        if not is_weights or file is None or other is None or file == other:
            continue
        for tensor, norm in tensor_changes(_fetch(store, file), _fetch(store, other)):
            layer = LAYER.search(tensor)
            number = int(layer[1]) if layer else None
            changes.append(LayerDifference(path=path, tensor=tensor, layer=number, relative_norm=norm))
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


def _natural_order(key: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
