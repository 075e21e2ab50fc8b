"""Send a delivery to its webhook, at least once; retry it, and disable a webhook that keeps failing."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import func
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import Webhook
from app.jobs import leases as job_leases
from app.jobs.leases import Lease
from app.observability.metrics import WEBHOOK_TRIES
from app.webhooks import queries
from app.webhooks.receivers import parse
from app.webhooks.sender import Attempt, Message, send
from app.webhooks.signing import WebhookKey
from app.worker.runner import Ending, JobContext

log = structlog.get_logger()

DELAYS = (5, 60, 300, 1800, 7200, 28800, 86400, 86400, 86400)
"""Seconds between the attempts, each ± 20 %. After ten attempts, three and a half days, a delivery has failed."""
PAUSE_SECONDS = 5.0  # after a failure nothing is sent to the webhook for so long
FAILING_DAYS = 5  # a webhook without one success for so long is disabled
SEND_SECONDS = 15.0  # time for the response; at most half the lease


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Send the delivery of each lease."""
    for lease in leases:
        with context.sessions() as session:
            message = _read_message(session, lease, context)
        attempt = _send(message, context) if message is not None else None
        with context.ending(lease) as ending:
            _write(ending, lease, attempt)


def _read_message(session: Session, lease: Lease, context: JobContext) -> Message | None:
    """Read what to send; None if the webhook was deleted or disabled since the claim."""
    delivery = queries.find_delivery(session, delivery_id=lease.target_id)
    webhook = queries.find_webhook(session, webhook_id=delivery.webhook_id) if delivery is not None else None
    if delivery is None or webhook is None or not webhook.enabled or context.settings.webhook_secret_key is None:
        return None
    key = WebhookKey.of(context.settings.webhook_secret_key)
    secrets = tuple(key.secret(salt) for salt in _salts(webhook, now=session.scalars(func.now().select()).one()))
    return Message(webhook.url, delivery.message_id, delivery.body, secrets)


def _salts(webhook: Webhook, *, now: datetime) -> list[bytes]:
    previous, expires_at = webhook.previous_secret_salt, webhook.previous_secret_expires_at
    overlaps = previous is not None and expires_at is not None and expires_at > now
    return [webhook.secret_salt, previous] if overlaps and previous is not None else [webhook.secret_salt]


def _send(message: Message, context: JobContext) -> Attempt:
    settings = context.settings
    seconds = min(SEND_SECONDS, settings.lease_seconds / 2)
    try:
        attempt = send(message, networks=settings.webhook_allowed_networks, seconds=seconds)
    except Exception:
        log.exception("sending a webhook failed unexpectedly")
        attempt = Attempt(datetime.now(UTC), 0.0, error="Internal error; the worker's log has the details.")
    WEBHOOK_TRIES.labels("delivered" if attempt.succeeded else "failed").inc()
    if not attempt.succeeded:  # of the URL only the host is logged: the path may hold a secret
        log.warning("webhook not delivered", receiver=parse(message.url).origin, status=attempt.status)
    return attempt


def _write(ending: Ending, lease: Lease, attempt: Attempt | None) -> None:
    """Write the attempt, and end the job or retry it later."""
    session = ending.session
    found = queries.find_delivery(session, delivery_id=lease.target_id)
    webhook = queries.find_webhook(session, webhook_id=found.webhook_id, lock=True) if found is not None else None
    delivery = queries.find_delivery(session, delivery_id=lease.target_id, lock=True)
    if attempt is None or webhook is None or delivery is None:
        job_leases.finish(session, lease=lease, state="cancelled")
        ending.outcome = "cancelled"
        return
    now = session.scalars(func.now().select()).one()
    delivery.attempts = [*delivery.attempts, attempt.as_json(number=lease.attempt)]
    if attempt.succeeded:
        webhook.failing_since, delivery.state = None, lease.kind.done
        job_leases.finish(session, lease=lease, state="succeeded")
        ending.outcome = "succeeded"
        return
    webhook.failing_since = webhook.failing_since or now
    webhook.paused_until = now + timedelta(seconds=max(PAUSE_SECONDS, attempt.retry_after))
    _disable_if_hopeless(session, webhook, attempt, now=now)
    if delivery.state == "pending" and lease.attempt <= len(DELAYS):
        delay = DELAYS[lease.attempt - 1] * random.uniform(0.8, 1.2)  # deliveries that failed together retry apart
        job_leases.requeue(session, lease=lease, delay=max(delay, attempt.retry_after))
        ending.outcome = "retried"
    else:
        delivery.state = "failed"
        job_leases.finish(session, lease=lease, state="failed")


def _disable_if_hopeless(session: Session, webhook: Webhook, attempt: Attempt, *, now: datetime) -> None:
    """Disable a webhook whose receiver is gone or has failed for days, and end its deliveries."""
    if attempt.status == 410:
        reason = "The receiver responded 410 Gone: it wants no more events."
    elif webhook.failing_since is not None and now - webhook.failing_since > timedelta(days=FAILING_DAYS):
        reason = f"No delivery succeeded for {FAILING_DAYS} days."
    else:
        return
    if webhook.enabled:
        webhook.enabled, webhook.disabled_reason = False, reason
        session.flush()
        queries.end_pending(session, webhook_id=webhook.id)
        target, details = f"webhook:{webhook.id}", {"reason": reason}
        record(session, actor="worker", action="webhook.disable", target=target, details=details)
