"""Claim the next jobs of each queue: work, in batches where the kind allows it, and deliveries one by one."""

from collections.abc import Callable
from uuid import UUID

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.db.models import Edit, Job
from app.jobs import leases
from app.jobs.leases import Lease
from app.jobs.queries import is_in_queue
from app.settings import Settings
from app.webhooks.queries import claimable_deliveries, lock_claims
from app.webhooks.signing import WebhookKey

PAYLOAD_VERSION = 1
"""Jobs of another version stay queued for workers that know it."""

Claim = Callable[[Session, Settings, str], list[Lease]]
"""Claims jobs of one kind for the named worker."""


def claim_work(session: Session, settings: Settings, worker: str) -> list[Lease]:
    """Claim the next job and, if its kind is batched, more jobs of the same kind and model."""
    claimed = _claim(session, settings, worker, select(Job.id).where(is_in_queue("work")))
    if claimed and claimed[0].kind.batches and settings.edit_batch_size > 1:
        kind, target_id = claimed[0].kind, claimed[0].target_id
        model = select(Edit.model_id).where(Edit.id == target_id).scalar_subquery()
        batch_candidates = select(Job.id).join(Edit, Edit.id == Job.target_id)
        batch_candidates = batch_candidates.where(is_in_queue("work"), Job.kind == kind.name, Edit.model_id == model)
        claimed += _claim(session, settings, worker, batch_candidates, limit=settings.edit_batch_size - 1)
    return claimed


def claim_delivery(session: Session, settings: Settings, worker: str) -> list[Lease]:
    """Claim a delivery to a webhook that was made with this service's key."""
    assert settings.webhook_secret_key is not None
    key = WebhookKey.of(settings.webhook_secret_key)
    lock_claims(session)
    return _claim(session, settings, worker, claimable_deliveries(key_id=key.id))


def _claim(
    session: Session, settings: Settings, worker: str, candidates: Select[UUID], *, limit: int = 1
) -> list[Lease]:
    return leases.claim(
        session,
        worker=worker,
        lease_seconds=settings.lease_seconds,
        candidates=candidates.where(Job.payload_version == PAYLOAD_VERSION),
        limit=limit,
    )
