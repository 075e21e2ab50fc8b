"""Webhooks and their deliveries in the database. Where both are locked, the webhook is locked first.

A sender holds a webhook for a while (`hold`), which is a lease by the database's clock: one sender at a time calls a
receiver, and one that died is followed by another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, Select, delete, func, insert, select, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Webhook, WebhookDelivery
from app.webhooks.payloads import AnyEvent, body

KEPT = timedelta(days=30)  # deliveries that have ended


def webhooks() -> Select[Webhook]:
    return select(Webhook)


def deliveries(*, webhook_id: UUID) -> Select[WebhookDelivery]:
    return select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)


def count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Webhook)) or 0


def webhook(session: Session, *, webhook_id: UUID, lock: bool = False) -> Webhook | None:
    """The webhook; locked against changes, not against new deliveries."""
    query = select(Webhook).where(Webhook.id == webhook_id)
    if lock:
        query = query.with_for_update(key_share=True)
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def delivery(session: Session, *, delivery_id: UUID, webhook_id: UUID, lock: bool = False) -> WebhookDelivery | None:
    query = deliveries(webhook_id=webhook_id).where(WebhookDelivery.id == delivery_id)
    if lock:
        query = query.with_for_update()
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def receivers_of(session: Session, *, event: str) -> list[UUID]:
    """The enabled webhooks that asked for the event, kept from deletion to the end of the transaction."""
    query = select(Webhook.id).where(Webhook.enabled, Webhook.events.contains([event])).order_by(Webhook.id)
    return list(session.scalars(query.with_for_update(read=True, key_share=True)))


def add_deliveries(session: Session, *, webhook_ids: Sequence[UUID], event: AnyEvent) -> list[UUID]:
    """Let the event be sent to each of the webhooks, due at once; returns the ids of the deliveries."""
    content, name = body(event), event.type
    ids = [uuid7() for _ in webhook_ids]
    rows = [
        {"id": id_, "webhook_id": each, "message_id": f"msg_{uuid7().hex}", "event": name, "body": content}
        for id_, each in zip(ids, webhook_ids, strict=True)
    ]
    session.execute(insert(WebhookDelivery), rows)
    return ids


def end_pending(session: Session, *, webhook_id: UUID) -> None:
    """Nothing more is sent to this webhook by itself."""
    waiting = (WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.state == "pending")
    session.execute(update(WebhookDelivery).where(*waiting).values(state="failed", ended_at=func.now()))


def forget(session: Session) -> int:
    """Delete deliveries that ended 30 days ago; returns how many. For the worker's housekeeping."""
    ended = delete(WebhookDelivery).where(WebhookDelivery.ended_at < func.now() - KEPT)
    return len(session.scalars(ended.returning(WebhookDelivery.id)).all())


@dataclass(frozen=True)
class Hold:
    """What a sender holds: the webhook, and the number of the hold."""

    webhook_id: UUID
    number: int


def hold(session: Session, *, key_id: str, seconds: float) -> Hold | None:
    """Take the webhook that has waited longest among those with something due; none where nothing is.

    Only webhooks made with the sender's key are taken: it can sign for no others.
    """
    due = select(WebhookDelivery.id).where(WebhookDelivery.webhook_id == Webhook.id, *_due())
    chosen = (
        select(Webhook.id)
        .where(Webhook.enabled, Webhook.key_id == key_id, Webhook.held_until <= func.now(), due.exists())
        .order_by(Webhook.held_until)
        .limit(1)
        .with_for_update(skip_locked=True, key_share=True)
    )
    webhook_id = session.scalar(chosen)
    if webhook_id is None:
        return None
    values = {"held_until": func.now() + timedelta(seconds=seconds), "holds": Webhook.holds + 1}
    held = update(Webhook).where(Webhook.id == webhook_id).values(values).returning(Webhook.holds)
    return Hold(webhook_id, session.scalars(held).one())


def held(session: Session, hold: Hold) -> Webhook | None:
    """The webhook, locked, if it is still held and enabled; none where it is another's, disabled or gone."""
    found = webhook(session, webhook_id=hold.webhook_id, lock=True)
    return found if found is not None and found.holds == hold.number and found.enabled else None


def keep(session: Session, hold: Hold, *, seconds: float) -> None:
    """Let the hold last for `seconds` from now: to renew it, to rest after a failure, or 0 to let go of it."""
    values = {"held_until": func.now() + timedelta(seconds=seconds)}
    ours = (Webhook.id == hold.webhook_id, Webhook.holds == hold.number)
    session.execute(update(Webhook).where(*ours).values(values))


def next_due(session: Session, *, webhook_id: UUID) -> WebhookDelivery | None:
    """The delivery that has been due for longest, locked."""
    query = deliveries(webhook_id=webhook_id).where(*_due()).order_by(WebhookDelivery.due_at, WebhookDelivery.id)
    return session.scalars(query.limit(1).with_for_update(), execution_options={"populate_existing": True}).first()


def _due() -> tuple[ColumnElement[bool], ...]:
    return WebhookDelivery.state == "pending", WebhookDelivery.due_at <= func.now()
