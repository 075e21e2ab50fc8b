"""Blobs come first, rows last; between them, nothing may take a blob for forgotten."""

from collections.abc import Iterable

from sqlalchemy.orm import Session

from app.db.blobs import hold_for_reference
from app.storage.store import BlobMissing, Store


def claim(session: Session, store: Store, digests: Iterable[str]) -> None:
    """Call it in the transaction that adds rows which name these blobs, before its audit event.

    From here to the end of the transaction none is deleted. Raises `BlobMissing` where one was, for having been put
    longer ago than the grace of `emender store collect`.
    """
    hold_for_reference(session)
    for sha256 in set(digests):
        if sha256 not in store:
            raise BlobMissing(sha256)
