"""Publish a checkpoint: its blobs are in the store already; its rows follow in one transaction."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints.aliases import move_requested_alias
from app.checkpoints.files import list_files, merge_files
from app.checkpoints.manifest import compute_commit
from app.db.models import Checkpoint, CheckpointFile, JsonObject
from editing.files import File


def publish(session: Session, *, checkpoint: Checkpoint, files: Sequence[File], report: JsonObject) -> None:
    """Make the checkpoint visible. The caller's transaction holds the lease of its job.

    Also moves the alias that apply named, unless it was moved in the meantime. The report says which.
    """
    served = merge_files(list_files(checkpoint.model), files)
    checkpoint.files = [CheckpointFile(path=file.path, sha256=file.sha256, size=file.size) for file in files]
    checkpoint.commit = compute_commit((file.path, file.sha256) for file in served.values())
    checkpoint.state = "published"
    checkpoint.published_at = session.scalar(select(func.now()))
    session.flush()
    outcome = None
    if checkpoint.alias is not None:
        reason = move_requested_alias(session, checkpoint=checkpoint)
        outcome = {"moved": reason is None, "detail": reason or f"It points at {checkpoint.version}."}
    checkpoint.report = {**report, "alias": outcome}
    action, target = "checkpoint.published", checkpoint.audit_target
    details = {"commit": checkpoint.commit, "files": {file.path: file.sha256 for file in files}}
    before, after = {"state": "building"}, {"state": checkpoint.state}
    record(session, actor="worker", action=action, target=target, details=details, before=before, after=after)
