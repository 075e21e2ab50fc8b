"""Estimate a model's second moments C0 over a list of captions.

The sums so far lie in the worker's folder, under `estimates/<id of the statistics>/`: when a worker dies, the next
attempt on the same machine goes on from there, and its result has the same bytes.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

import editing
from app.db.models import JsonObject, Model, Statistics
from app.jobs.leases import Lease
from app.storage.references import pin_blobs
from app.worker.outcome import record_state
from app.worker.runner import JobContext
from editing.errors import Cancelled, EditingError, ForeignSums

if TYPE_CHECKING:
    from editing.encoders.clip import EditableEncoder
    from editing.second_moments.moments import SecondMoments

log = structlog.get_logger()


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Estimate, store the tensors by their sha256, and make the statistics ready."""
    for lease in leases:
        _estimate(context, lease)


def fail(session: Session, *, lease: Lease, problem: JsonObject) -> None:
    """The statistics are `failed`."""
    statistics = session.get_one(Statistics, lease.target_id)
    was = statistics.state
    statistics.state, statistics.problem = "failed", problem
    details = {"statistics": str(statistics.id), "attempt": lease.attempt, "problem": problem["title"]}
    _record(session, statistics, was=was, details=details)


def _record(session: Session, statistics: Statistics, *, was: str, details: JsonObject) -> None:
    target = f"model:{session.get_one(Model, statistics.model_id).name}"
    record_state(session, noun="statistics", target=target, was=was, state=statistics.state, details=details)


def _estimate(context: JobContext, lease: Lease) -> None:
    home = context.settings.data_dir / "estimates"
    with context.sessions() as session:
        statistics = session.get_one(Statistics, lease.target_id)
        _sweep(session, home)
    if statistics.captions_sha256 is None:
        raise EditingError("these statistics name no captions", pointer="/captions")
    captions = context.store.read(statistics.captions_sha256).decode().splitlines()
    pipeline = context.pipeline(statistics.model_id)
    scratch = home / str(statistics.id)
    scratch.mkdir(parents=True, exist_ok=True)

    def progress(read: int) -> None:
        if context.cancelled(lease):
            raise Cancelled("the estimate was interrupted")
        done, encoders = len(parts) * len(captions) + read, len(pipeline.encoders)
        context.report(lease, "reading captions", done, len(captions) * encoders)

    def estimate(encoder: "EditableEncoder", partial: Path) -> "SecondMoments":
        return editing.estimate_second_moments(encoder, captions, progress=progress, partial=partial)

    parts: list[SecondMoments] = []
    for encoder in pipeline.encoders:
        partial = scratch / f"{encoder.name}.safetensors"
        if partial.exists():
            log.info("estimate goes on", statistics=str(statistics.id), encoder=encoder.name)
        try:
            part = estimate(encoder, partial)
        except ForeignSums as reason:
            log.warning("estimate begun anew", reason=reason.detail)
            partial.unlink()
            part = estimate(encoder, partial)
        parts.append(part)
    moments = editing.SecondMoments.join(parts)
    digest = context.store.put(moments.to_bytes())

    with context.result(lease) as session:
        pin_blobs(session, context.store, [digest])
        statistics = session.get_one(Statistics, lease.target_id)
        was = statistics.state
        statistics.state, statistics.problem = "ready", None
        statistics.captions, statistics.tokens, statistics.digest = moments.captions, moments.tokens, digest
        details = {"statistics": str(statistics.id), "digest": digest, "tokens": moments.tokens}
        _record(session, statistics, was=was, details=details)
    shutil.rmtree(scratch, ignore_errors=True)


def _sweep(session: Session, home: Path) -> None:
    """Remove what failed estimates have left. The folders are listed first: one that is made meanwhile stays."""
    folders = list(home.glob("*"))
    under_way = select(Statistics.id).where(Statistics.state.in_(("queued", "estimating")))
    names = {str(statistics_id) for statistics_id in session.scalars(under_way)}
    for folder in folders:
        if folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)
