"""Estimate a model's second moments C0 over a list of captions.

Partial sums are kept in the worker's folder, under `estimates/<id of the statistics>/`. When a worker dies, the next
attempt on the same machine continues from them, and its result has the same bytes.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

import editing
from app.db.models import Statistics
from app.jobs.leases import Lease
from app.jobs.states import end_resource
from app.models.queries import family_of
from app.storage.references import pin_blobs
from app.worker.runner import JobContext
from editing.errors import EditingError, ForeignSums
from editing.families.layout import find_value_layer

if TYPE_CHECKING:
    from editing.encoders.base import TextEncoder
    from editing.second_moments.moments import SecondMoments

log = structlog.get_logger()


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Estimate the second moments, store them by sha256, and make the statistics ready."""
    (lease,) = leases
    home = context.settings.data_dir / "estimates"
    with context.sessions() as session:
        statistics = session.get_one(Statistics, lease.target_id)
        family, sizes = family_of(statistics.model), statistics.model.encoders
        _remove_abandoned(session, home)
    if statistics.captions_sha256 is None:
        raise EditingError("these statistics name no captions", pointer="/captions")
    captions = context.store.read(statistics.captions_sha256).decode().splitlines()
    last_layers = {
        size["name"]: find_value_layer(family.find_encoder(size["name"]), layers=size["layers"]) for size in sizes
    }
    scratch = home / str(statistics.id)
    scratch.mkdir(parents=True, exist_ok=True)

    def progress(read: int) -> None:
        done, total = len(parts) * len(captions) + read, len(captions) * len(sizes)
        context.advance(lease, "reading captions", done, total)

    def estimate(encoder: "TextEncoder", partial: Path) -> "SecondMoments":
        return editing.estimate_second_moments(encoder, captions, progress=progress, partial=partial)

    parts: list[SecondMoments] = []
    for encoder in context.pipelines.load_encoders(statistics.model_id, last_layers):
        partial = scratch / f"{encoder.name}.safetensors"
        if partial.exists():
            log.info("estimate continues", statistics=str(statistics.id), encoder=encoder.name)
        try:
            part = estimate(encoder, partial)
        except ForeignSums as reason:
            log.warning("estimate starts again", reason=reason.detail)
            partial.unlink()
            part = estimate(encoder, partial)
        parts.append(part)
    moments = editing.SecondMoments.join(parts)
    digest = context.store.put(moments.to_bytes())

    with context.result(lease) as session:
        pin_blobs(session, context.store, [digest])
        statistics = session.get_one(Statistics, lease.target_id)
        statistics.captions, statistics.tokens, statistics.digest = moments.captions, moments.tokens, digest
        statistics.truncated = max(part.truncated for part in moments.per_encoder)
        details = {"digest": digest, "tokens": moments.tokens, "truncated": statistics.truncated}
        end_resource(session, lease=lease, state=lease.kind.done, details=details)
    shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(session: Session, home: Path) -> None:
    """Remove partial sums of ended estimates. Folders are listed first, so that one created now is kept."""
    folders = list(home.glob("*"))
    under_way = select(Statistics.id).where(Statistics.state.in_(("queued", "estimating")))
    names = {str(statistics_id) for statistics_id in session.scalars(under_way)}
    for folder in folders:
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)
