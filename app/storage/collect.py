"""Garbage collection: delete blobs that no row references, and files that interrupted writes left."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from app.audit.service import record
from app.db.engine import Sessions
from app.storage.references import find_referenced, pause_references
from app.storage.store import BlobMissing, Store

BATCH = 100  # blobs deleted in one transaction; publishing waits for its end


@dataclass
class Collected:
    """What was deleted, or what a dry run would delete."""

    blobs: int = 0
    bytes: int = 0
    temporary_files: int = 0


def collect_garbage(
    sessions: Sessions, store: Store, *, grace: timedelta, retracted: bool = False, dry_run: bool = False, actor: str
) -> Collected:
    """Delete blobs that were stored longer than `grace` ago and that no row references.

    `retracted=True` also deletes the files of retracted checkpoints. References cannot be added while a batch is
    looked up and deleted. One audit event has the counts, also after an error.
    """
    before = datetime.now(UTC) - grace
    done = Collected()
    old = (blob for blob in store.list_blobs() if blob.stored_at < before)
    try:
        while batch := list(islice(old, BATCH)):
            with sessions() as session:
                pause_references(session)
                kept = find_referenced(session, among=[blob.sha256 for blob in batch], retracted=not retracted)
                for blob in batch:
                    if blob.sha256 in kept or not _is_old(store, blob.sha256, before=before):
                        continue
                    if not dry_run:
                        store.delete(blob.sha256)
                    done.blobs += 1
                    done.bytes += blob.size
                session.commit()
        if not dry_run:
            done.temporary_files = store.remove_temporary_files(before=before)
    finally:
        if not dry_run and done != Collected():
            with sessions() as session:
                details = {**asdict(done), "grace_hours": grace / timedelta(hours=1), "retracted": retracted}
                record(session, actor=actor, action="store.collect", target="store", details=details)
                session.commit()
    return done


def _is_old(store: Store, sha256: str, *, before: datetime) -> bool:
    """Check the time again: the blob may have been deleted or stored again since it was listed."""
    try:
        return store.stat(sha256).stored_at < before
    except BlobMissing:
        return False
