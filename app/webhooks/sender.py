"""Sends what is due, at least once. Runs in threads of every worker; any number may run at once.

A sender holds one webhook at a time and sends its deliveries one after another, so that a receiver is never called
twice at once, however many edits became ready. A sender that dies lets its hold run out; another then sends again
what was under way. No database connection is held while a receiver is called.
"""

import random
import ssl
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from uuid import UUID

import structlog
from sqlalchemy import func
from sqlalchemy.exc import DBAPIError

import editing
from app.audit.service import record
from app.db.engine import Sessions
from app.db.models import JsonObject, Webhook, WebhookDelivery
from app.observability.metrics import WEBHOOK_TRIES
from app.settings import Settings
from app.webhooks import queries, signing
from app.webhooks.connect import NotReached, Resolve, post, resolve
from app.webhooks.queries import Hold
from app.webhooks.receivers import Network, parse
from app.webhooks.signing import WebhookKey

log = structlog.get_logger()

PAUSES = (5, 60, 300, 1800, 7200, 28800, 86400, 86400, 86400)
"""Seconds between the tries of a delivery, each longer or shorter by up to a fifth. After ten tries, three and a half
days, it has failed."""
REST_SECONDS = 5.0  # after a failure nothing is sent to the receiver for so long
RETRY_AFTER_SECONDS = 3600.0  # nothing is sent for at most so long to a receiver that asks for patience (Retry-After)
FAILING_DAYS = 5  # a webhook that failed for so long without one success is disabled
ROUND_SECONDS = 20.0  # then another webhook's turn comes
SEND_SECONDS = 15.0  # a receiver may take so long for its answer, and at most half the lease


@dataclass(frozen=True)
class Message:
    """What is sent, and to whom."""

    delivery_id: UUID
    url: str
    message_id: str
    body: str
    secrets: tuple[str, ...] = field(repr=False)
    number: int  # of the try


@dataclass(frozen=True)
class Outcome:
    """What came of a try."""

    at: datetime
    seconds: float
    status: int | None
    error: str | None
    excerpt: str | None
    patience: float = 0.0
    """Seconds for which the receiver wants to be left in peace."""

    @property
    def succeeded(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Sender:
    """What a worker needs to send: its key, the networks that may be called, and how long things may take."""

    def __init__(
        self,
        sessions: Sessions,
        *,
        key: WebhookKey,
        networks: tuple[Network, ...] = (),
        lease_seconds: float = 30.0,
        resolve: Resolve = resolve,
    ) -> None:
        self.sessions = sessions
        self.key = key
        self.networks = networks
        self.lease_seconds = lease_seconds
        self.send_seconds = min(SEND_SECONDS, lease_seconds / 2)
        self.resolve = resolve

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Trusts what the machine trusts; SSL_CERT_FILE names the authorities of a closed network."""
        return ssl.create_default_context()

    def run(self, *, stopping: threading.Event, poll_seconds: float) -> None:
        """Send until `stopping` is set, whatever happens to the database."""
        away = False
        while not stopping.is_set():
            try:
                worked = self.round(stopping)
                away = False
            except DBAPIError as error:
                worked = False
                if not away:
                    log.warning("webhooks wait: the database does not answer", error=type(error).__name__)
                away = True
            except Exception:
                worked = False
                log.exception("sending a webhook failed unexpectedly; sending goes on")
            if not worked:
                stopping.wait(poll_seconds)

    def round(self, stopping: threading.Event) -> bool:
        """Serve one webhook: send what is due, until something fails or its time is over. False where none waits."""
        with self.sessions() as session:
            hold = queries.hold(session, key_id=self.key.id, seconds=self.lease_seconds)
            session.commit()
        if hold is None:
            return False
        rest = 0.0
        deadline = time.monotonic() + ROUND_SECONDS
        while time.monotonic() < deadline and not stopping.is_set():
            message = self._take(hold)
            if message is None:
                break
            outcome = self._send(message)
            self._settle(hold, message, outcome)
            if not outcome.succeeded:
                rest = max(REST_SECONDS, outcome.patience)
                break
        with self.sessions() as session:
            queries.keep(session, hold, seconds=rest)
            session.commit()
        return True

    def _take(self, hold: Hold) -> Message | None:
        """The next message, counted as tried before it is sent; none where nothing is due or the hold was lost."""
        with self.sessions() as session:
            webhook = queries.held(session, hold)
            delivery = queries.next_due(session, webhook_id=hold.webhook_id) if webhook is not None else None
            if webhook is None or delivery is None:
                return None
            queries.keep(session, hold, seconds=self.lease_seconds)
            delivery.tries += 1
            now = session.scalars(func.now().select()).one()
            secrets = self._secrets(webhook, now=now)
            message = Message(delivery.id, webhook.url, delivery.message_id, delivery.body, secrets, delivery.tries)
            session.commit()
        return message

    def _secrets(self, webhook: Webhook, *, now: datetime) -> tuple[str, ...]:
        salts = [webhook.salt]
        if webhook.previous_salt is not None and webhook.previous_until is not None and webhook.previous_until > now:
            salts.append(webhook.previous_salt)
        return tuple(self.key.secret(salt) for salt in salts)

    def _send(self, message: Message) -> Outcome:
        at, started = datetime.now(UTC), time.monotonic()
        headers = {
            "content-type": "application/json",
            "user-agent": f"Emender/{editing.__version__}",
            **signing.headers(message_id=message.message_id, at=at, body=message.body, secrets=message.secrets),
        }
        status = error = excerpt = None
        patience = 0.0
        try:
            answer = post(
                message.url,
                headers=headers,
                body=message.body.encode(),
                networks=self.networks,
                seconds=self.send_seconds,
                tls=self.tls,
                resolve=self.resolve,
            )
            status, excerpt = answer.status, answer.excerpt
            if status in (429, 503) and answer.retry_after is not None:
                patience = min(answer.retry_after, RETRY_AFTER_SECONDS)
        except NotReached as reason:
            error = str(reason)
        return Outcome(at, round(time.monotonic() - started, 3), status, error, excerpt, patience)

    def _settle(self, hold: Hold, message: Message, outcome: Outcome) -> None:
        """Write what came of it. A webhook deleted meanwhile took its deliveries with it."""
        with self.sessions() as session:
            webhook = queries.webhook(session, webhook_id=hold.webhook_id, lock=True)
            delivery = queries.delivery(session, delivery_id=message.delivery_id, webhook_id=hold.webhook_id, lock=True)
            if webhook is None or delivery is None:
                return
            now = session.scalars(func.now().select()).one()
            delivery.attempts = [*delivery.attempts, _attempt(message, outcome)]
            if outcome.succeeded:
                delivery.state, delivery.ended_at = "delivered", now
                webhook.failing_since = None
            else:
                _failed(delivery, webhook, now=now, patience=outcome.patience)
                reason = _hopeless(webhook, outcome, now=now)
                if reason is not None and webhook.enabled:
                    webhook.enabled, webhook.disabled_reason = False, reason
                    session.flush()
                    queries.end_pending(session, webhook_id=webhook.id)
                    target, details = f"webhook:{webhook.id}", {"reason": reason}
                    record(session, actor="worker", action="webhook.disable", target=target, details=details)
            session.commit()
        WEBHOOK_TRIES.labels("delivered" if outcome.succeeded else "failed").inc()
        if not outcome.succeeded:
            where = parse(message.url).origin  # a path may hold a secret
            log.warning("webhook not delivered", webhook=str(hold.webhook_id), receiver=where, status=outcome.status)


def open_sender(settings: Settings, sessions: Sessions) -> Sender | None:
    """The sender of the settings; none without a key: workers that have one send."""
    if settings.webhook_secret_key is None:
        return None
    key = WebhookKey.of(settings.webhook_secret_key)
    return Sender(sessions, key=key, networks=settings.webhook_allowed_networks, lease_seconds=settings.lease_seconds)


def _attempt(message: Message, outcome: Outcome) -> JsonObject:
    return {
        "number": message.number,
        "at": outcome.at.isoformat(),
        "seconds": outcome.seconds,
        "status": outcome.status,
        "error": outcome.error,
        "excerpt": outcome.excerpt,
    }


def _failed(delivery: WebhookDelivery, webhook: Webhook, *, now: datetime, patience: float) -> None:
    """Due again after a pause of `patience` seconds at least, or at an end; one that was ended meanwhile stays so."""
    webhook.failing_since = webhook.failing_since or now
    if delivery.state != "pending":
        return
    if delivery.tries > len(PAUSES):
        delivery.state, delivery.ended_at = "failed", now
        return
    pause = PAUSES[delivery.tries - 1] * random.uniform(0.8, 1.2)  # many that failed together do not come together
    delivery.due_at = now + timedelta(seconds=max(pause, patience))


def _hopeless(webhook: Webhook, outcome: Outcome, *, now: datetime) -> str | None:
    """Why the webhook is to be disabled, if it is."""
    if outcome.status == 410:
        return "The receiver answered 410 Gone: it wants no more."
    if webhook.failing_since is not None and now - webhook.failing_since > timedelta(days=FAILING_DAYS):
        return f"No delivery succeeded for {FAILING_DAYS} days."
    return None
