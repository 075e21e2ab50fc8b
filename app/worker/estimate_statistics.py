"""Estimate a model's second moments C0 over a list of captions."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

import editing
from app.audit.service import record
from app.db.leases import Lease
from app.db.models import JsonObject, Model, Statistics
from app.worker.runner import JobContext
from editing.errors import Cancelled, EditingError

if TYPE_CHECKING:
    from editing.statistics import SecondMoments


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Estimate, store the tensors by their sha256, and make the statistics ready."""
    for lease in leases:
        _estimate(context, lease)


def fail(session: Session, *, lease: Lease, problem: JsonObject) -> None:
    """The statistics are `failed`."""
    statistics = session.get_one(Statistics, lease.target_id)
    statistics.state, statistics.problem = "failed", problem
    details = {"statistics": str(statistics.id), "attempt": lease.attempt, "problem": problem["title"]}
    record(session, actor="worker", action="statistics.failed", target=_model(session, statistics), details=details)


def _model(session: Session, statistics: Statistics) -> str:
    return f"model:{session.get_one(Model, statistics.model_id).name}"


def _estimate(context: JobContext, lease: Lease) -> None:
    with context.sessions() as session:
        statistics = session.get_one(Statistics, lease.target_id)
    if statistics.captions_sha256 is None:
        raise EditingError("these statistics name no captions", pointer="/captions")
    captions = context.store.read(statistics.captions_sha256).decode().splitlines()
    pipeline = context.pipeline(statistics.model_id)

    def interruptible() -> Iterator[str]:
        for caption in captions:
            if context.cancelled(lease):
                raise Cancelled("the estimate was interrupted")
            yield caption

    parts: list[SecondMoments] = []

    def progress(read: int) -> None:
        done, encoders = len(parts) * len(captions) + read, len(pipeline.encoders)
        context.progress(lease, {"captions": done, "of": len(captions) * encoders})

    for encoder in pipeline.encoders:
        parts.append(editing.estimate_second_moments(encoder, interruptible(), progress=progress))
    moments = editing.SecondMoments.join(parts)
    digest = context.store.put(moments.to_bytes())

    with context.result(lease) as session:
        statistics = session.get_one(Statistics, lease.target_id)
        statistics.state, statistics.problem = "ready", None
        statistics.captions, statistics.tokens, statistics.digest = moments.captions, moments.tokens, digest
        details = {"statistics": str(statistics.id), "digest": digest, "tokens": moments.tokens}
        record(session, actor="worker", action="statistics.ready", target=_model(session, statistics), details=details)
