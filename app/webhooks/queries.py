"""Webhooks, their deliveries and the jobs that send them. Locks are taken in the order job, webhook, delivery."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, Select, delete, exists, func, insert, or_, select, text, update
from sqlalchemy.orm import Session, aliased
from uuid_utils.compat import uuid7

from app.db.models import Job, Webhook, WebhookDelivery
from app.jobs.enqueue import enqueue
from app.jobs.kinds import DELIVER_WEBHOOK

RETENTION = timedelta(days=30)  # of deliveries that have ended
CLAIM_LOCK = 0x686F6F6B  # advisory


def webhooks() -> Select[Webhook]:
    return select(Webhook)


def deliveries(*, webhook_id: UUID) -> Select[WebhookDelivery]:
    return select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)


def count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Webhook)) or 0


def find_webhook(session: Session, *, webhook_id: UUID, lock: bool = False) -> Webhook | None:
    """Find a webhook. The lock keeps changes out, not new deliveries."""
    for_update = {"key_share": True} if lock else None
    return session.get(Webhook, webhook_id, populate_existing=True, with_for_update=for_update)


def find_delivery(session: Session, *, delivery_id: UUID, lock: bool = False) -> WebhookDelivery | None:
    return session.get(WebhookDelivery, delivery_id, populate_existing=True, with_for_update=lock)


def find_subscribed(session: Session, *, event: str) -> list[UUID]:
    """Return the enabled webhooks of an event. They cannot be deleted until the transaction ends."""
    query = select(Webhook.id).where(Webhook.enabled, Webhook.events.contains([event])).order_by(Webhook.id)
    return list(session.scalars(query.with_for_update(read=True, key_share=True)))


def add_deliveries(
    session: Session, *, webhook_ids: Sequence[UUID], event: str, body: str, message_id: str | None = None
) -> list[UUID]:
    """Enqueue the delivery of an event to each webhook; returns the ids of the deliveries."""
    ids = [uuid7() for _ in webhook_ids]
    rows = [
        {
            "id": delivery_id,
            "webhook_id": webhook_id,
            "message_id": message_id or f"msg_{uuid7().hex}",
            "event": event,
            "body": body,
        }
        for delivery_id, webhook_id in zip(ids, webhook_ids, strict=True)
    ]
    session.execute(insert(WebhookDelivery), rows)
    for delivery_id, webhook_id in zip(ids, webhook_ids, strict=True):
        # Each webhook is an actor of its own, so that the order is fair between them.
        enqueue(session, kind=DELIVER_WEBHOOK, target_id=delivery_id, actor=f"webhook:{webhook_id}")
    return ids


def end_pending(session: Session, *, webhook_id: UUID) -> None:
    """End the deliveries of a webhook that are not sent yet."""
    pending = WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.state == "pending"
    jobs = update(Job).where(
        _IS_DELIVERY, Job.state == "queued", Job.target_id.in_(select(WebhookDelivery.id).where(*pending))
    )
    session.execute(jobs.values(state="cancelled", finished_at=func.now()), execution_options=_UNSYNCHRONIZED)
    session.execute(update(WebhookDelivery).where(*pending).values(state="failed"))


def delete_old_deliveries(session: Session) -> int:
    """Delete the deliveries that ended 30 days ago, and their jobs; returns how many."""
    old = delete(Job).where(_IS_DELIVERY, Job.finished_at < func.now() - RETENTION).returning(Job.target_id)
    ids = session.scalars(old, execution_options=_UNSYNCHRONIZED).all()
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.id.in_(ids)), execution_options=_UNSYNCHRONIZED)
    return len(ids)


def lock_claims(session: Session) -> None:
    """Serialize claims of deliveries until the transaction ends, so that each sees what earlier ones claimed."""
    session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CLAIM_LOCK})


def claimable_deliveries(*, key_id: str) -> Select[UUID]:
    """Select the jobs of deliveries that may be sent now.

    Their webhook is enabled, not paused and made with this key, and no other delivery to it is running.
    """
    running, sent = aliased(Job), aliased(WebhookDelivery)
    being_sent = exists().where(
        running.kind == DELIVER_WEBHOOK.name,
        running.state == "running",
        sent.id == running.target_id,
        sent.webhook_id == Webhook.id,
    )
    return (
        select(Job.id)
        .join(WebhookDelivery, WebhookDelivery.id == Job.target_id)
        .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
        .where(_IS_DELIVERY, Webhook.enabled, Webhook.key_id == key_id, ~being_sent)
        .where(or_(Webhook.paused_until.is_(None), Webhook.paused_until <= func.now()))
    )


_IS_DELIVERY: ColumnElement[bool] = Job.kind == DELIVER_WEBHOOK.name
_UNSYNCHRONIZED = {"synchronize_session": False}
