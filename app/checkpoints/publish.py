"""How a checkpoint appears: blobs first, each whole and under its sha256; then every row, in one transaction."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.aliases import move_if_unmoved
from app.checkpoints.manifest import commit_of
from app.db.models import Checkpoint, CheckpointFile, JsonObject
from app.storage.store import Store

WEIGHTS = re.compile(r".*\.(safetensors|safetensors\.index\.json)")
EDITABLE = ("text_encoder/", "text_encoder_2/", "unet/")


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint whose blob is in the store."""

    path: str
    sha256: str
    size: int


def store_folder(store: Store, folder: Path) -> list[StoredFile]:
    """Put every file below the folder into the store."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        StoredFile(path.relative_to(folder).as_posix(), store.put_file(path), path.stat().st_size) for path in paths
    ]


def store_content(store: Store, path: str, content: bytes) -> StoredFile:
    return StoredFile(path, store.put(content), len(content))


def served_files(base: Iterable[StoredFile], own: Iterable[StoredFile]) -> dict[str, StoredFile]:
    """What a revision serves, by path: the checkpoint's own files over those of the base model.

    Of an edited text encoder or U-Net only the edited weights are served: a loader that asks for another variant
    (`model.fp16.safetensors`) finds none, rather than the unedited one.
    """
    own = list(own)
    edited = {file.path.partition("/")[0] for file in own if file.path.startswith(EDITABLE)}
    kept = (f for f in base if not (f.path.partition("/")[0] in edited and WEIGHTS.fullmatch(f.path)))
    return dict(sorted({file.path: file for file in (*kept, *own)}.items()))


def base_files(session: Session, *, checkpoint: Checkpoint) -> list[StoredFile]:
    rows = queries.model_files(session, model_id=checkpoint.model_id)
    return [StoredFile(row.path, row.sha256, row.size) for row in rows]


def own_files(checkpoint: Checkpoint) -> list[StoredFile]:
    return [StoredFile(row.path, row.sha256, row.size) for row in checkpoint.files]


def publish(session: Session, *, checkpoint: Checkpoint, files: Sequence[StoredFile], report: JsonObject) -> None:
    """Add every row that makes the checkpoint visible to the transaction, which the caller has fenced.

    The alias that apply named is moved too, unless it was moved meanwhile; the report says which.
    """
    model = checkpoint.model
    served = served_files(base_files(session, checkpoint=checkpoint), files)
    checkpoint.files = [CheckpointFile(path=file.path, sha256=file.sha256, size=file.size) for file in files]
    checkpoint.commit = commit_of((file.path, file.sha256) for file in served.values())
    checkpoint.state = "published"
    checkpoint.published_at = session.scalar(select(func.now()))
    session.flush()
    outcome: Mapping[str, object] | None = None
    if checkpoint.alias is not None:
        lost = move_if_unmoved(session, model=model, checkpoint=checkpoint, actor=checkpoint.created_by)
        outcome = {"moved": lost is None, "detail": lost or f"It points at v{checkpoint.number}."}
    checkpoint.report = {**report, "alias": outcome}
    record(
        session,
        actor="worker",
        action="checkpoint.published",
        target=f"checkpoint:{model.name}/v{checkpoint.number}",
        details={"commit": checkpoint.commit, "files": {file.path: file.sha256 for file in files}},
        before={"state": "building"},
        after={"state": checkpoint.state},
    )
