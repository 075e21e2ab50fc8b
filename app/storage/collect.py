"""Delete the blobs that no row refers to, and what died writes left behind."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from app.audit.service import record
from app.db.engine import Sessions
from app.storage.references import find_referenced, pause_references
from app.storage.store import Blob, BlobMissing, Store

BATCH = 100  # blobs deleted in one transaction, for which publishers wait


@dataclass
class Collected:
    """What was deleted, or would be."""

    blobs: int = 0
    bytes: int = 0
    temporaries: int = 0


def collect(
    sessions: Sessions,
    store: Store,
    *,
    grace: timedelta,
    retracted: bool = False,
    dry_run: bool = False,
    actor: str,
) -> Collected:
    """Delete what nothing refers to and was put more than `grace` ago; with `retracted`, files of retracted versions.

    Never a blob that is served: a batch is looked up and deleted while nobody can add a reference, and one that was put
    again meanwhile is young. A publisher whose blob went before it came to its rows is told (`claims.claim`). One audit
    event has the counts, also where an error ends the work.
    """
    before = datetime.now(UTC) - grace
    done = Collected()
    candidates = (blob for blob in store.list_blobs() if blob.stored_at < before)
    try:
        for batch in _batches(candidates):
            _delete(sessions, store, batch, done, before=before, retracted=retracted, dry_run=dry_run)
        if not dry_run:
            done.temporaries = store.remove_temporary_files(before=before)
    finally:
        if not dry_run and done != Collected():
            with sessions() as session:
                details = {**asdict(done), "grace_hours": grace / timedelta(hours=1), "retracted": retracted}
                record(session, actor=actor, action="store.collect", target="store", details=details)
                session.commit()
    return done


def _delete(
    sessions: Sessions,
    store: Store,
    batch: list[Blob],
    done: Collected,
    *,
    before: datetime,
    retracted: bool,
    dry_run: bool,
) -> None:
    with sessions() as session:
        pause_references(session)
        kept = find_referenced(session, among=[blob.sha256 for blob in batch], retracted=not retracted)
        for blob in batch:
            if blob.sha256 in kept or not _still_old(store, blob.sha256, before=before):
                continue
            if not dry_run:
                store.delete(blob.sha256)
            done.blobs += 1
            done.bytes += blob.size
        session.commit()


def _still_old(store: Store, sha256: str, *, before: datetime) -> bool:
    try:
        return store.stored_at(sha256) < before
    except BlobMissing:
        return False


def _batches(blobs: Iterator[Blob]) -> Iterator[list[Blob]]:
    while batch := list(islice(blobs, BATCH)):
        yield batch
