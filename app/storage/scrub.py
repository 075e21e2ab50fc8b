"""Compare every blob with its sha256, and find referenced blobs that are missing."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.audit.service import record
from app.db.engine import Sessions
from app.storage.references import list_references
from app.storage.store import BlobCorrupt, BlobMissing, Store


@dataclass(frozen=True)
class Finding:
    """A damaged or missing blob."""

    sha256: str
    references: Sequence[str]
    """The rows that reference it, such as `checkpoint:emoji/v3/text_encoder/model.safetensors`."""


@dataclass(frozen=True)
class ScrubReport:
    blobs: int
    bytes: int
    damaged: Sequence[Finding]
    missing: Sequence[Finding]
    """Referenced, and not in the store. Files of retracted checkpoints may be missing."""
    quarantined: bool

    @property
    def is_clean(self) -> bool:
        return not self.damaged and not self.missing


def scrub(
    sessions: Sessions,
    store: Store,
    *,
    quarantine: bool = False,
    actor: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> ScrubReport:
    """Verify every blob while the service runs. `on_progress` receives the bytes done and the total.

    `quarantine=True` moves damaged blobs aside and records their number in an audit event.
    """
    blobs = list(store.list_blobs())
    damaged, done, total = [], 0, sum(blob.size for blob in blobs)
    for blob in blobs:
        try:
            store.verify(blob.sha256)
        except BlobCorrupt:
            damaged.append(blob.sha256)
        except BlobMissing:
            pass  # deleted since it was listed; if a row references it, it is reported as missing below
        done += blob.size
        if on_progress is not None:
            on_progress(done, total)
    with sessions() as session:
        references, needed = list_references(session), list_references(session, retracted=False)
        listed = {blob.sha256 for blob in blobs}
        missing = [sha256 for sha256 in sorted(needed.keys() - listed) if sha256 not in store]
        if quarantine and damaged:
            for sha256 in damaged:
                store.quarantine(sha256)
            record(session, actor=actor, action="store.quarantine", target="store", details={"blobs": len(damaged)})
            session.commit()
    findings = (_findings(damaged, references), _findings(missing, references))
    return ScrubReport(len(blobs), total, *findings, quarantined=quarantine and bool(damaged))


def _findings(digests: Iterable[str], references: Mapping[str, Sequence[str]]) -> list[Finding]:
    return [Finding(sha256, references.get(sha256, [])) for sha256 in digests]
