"""Read every blob again and hold it against its sha256; look for those that rows refer to and that are not there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.audit.service import record
from app.db.engine import Sessions
from app.storage.references import list_references
from app.storage.store import BlobCorrupt, BlobMissing, Store


@dataclass(frozen=True)
class Finding:
    """A blob that is not what it should be."""

    sha256: str
    of: Sequence[str]
    """What refers to it, such as `checkpoint:emoji/v3/text_encoder/model.safetensors`; empty: nothing does."""


@dataclass(frozen=True)
class Scrubbed:
    """What was found."""

    blobs: int
    bytes: int
    damaged: Sequence[Finding]
    missing: Sequence[Finding]
    """Referred to, and not in the store. Files of retracted versions may be gone."""
    quarantined: bool

    @property
    def sound(self) -> bool:
        return not self.damaged and not self.missing


def scrub(
    sessions: Sessions,
    store: Store,
    *,
    quarantine: bool = False,
    actor: str,
    progress: Callable[[int, int], None] | None = None,
) -> Scrubbed:
    """Check every blob. With `quarantine` the damaged ones are moved aside, and an audit event counts them.

    Services go on meanwhile. `progress` is given bytes.
    """
    blobs = list(store.list_blobs())
    damaged, done, total = [], 0, sum(blob.size for blob in blobs)
    for blob in blobs:
        try:
            store.verify(blob.sha256)
        except BlobCorrupt:
            damaged.append(blob.sha256)
        except BlobMissing:
            pass  # deleted since it was listed; where a row refers to it, it is found missing below
        done += blob.size
        if progress is not None:
            progress(done, total)
    with sessions() as session:
        places, needed = list_references(session), list_references(session, retracted=False)
        listed = {blob.sha256 for blob in blobs}
        missing = [sha256 for sha256 in sorted(needed.keys() - listed) if sha256 not in store]
        if quarantine and damaged:
            for sha256 in damaged:
                store.quarantine(sha256)
            record(session, actor=actor, action="store.quarantine", target="store", details={"blobs": len(damaged)})
            session.commit()
    return Scrubbed(len(blobs), total, _found(damaged, places), _found(missing, places), quarantine and bool(damaged))


def _found(digests: Iterable[str], places: Mapping[str, Sequence[str]]) -> list[Finding]:
    return [Finding(sha256, places.get(sha256, [])) for sha256 in digests]
