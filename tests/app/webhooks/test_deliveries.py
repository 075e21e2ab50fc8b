"""Deliveries to a real receiver, from the audit event to the last attempt."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from app.audit.service import record
from app.db.engine import Sessions
from app.db.models import AuditEvent, Job, Webhook, WebhookDelivery
from app.jobs.sweeper import requeue_expired_jobs
from app.local.child_process import die_with_parent
from app.local.supervisor import to_environment
from app.settings import Settings
from app.webhooks import queries
from app.webhooks.sender import MAX_RETRY_AFTER
from app.webhooks.service import delete_webhook, read_delivery, rotate_secret
from app.webhooks.signing import WebhookKey, new_salt
from app.worker.runner import Runner
from app.worker.tasks import deliver_webhook
from app.worker.tasks.deliver_webhook import DELAYS
from emender.schemas.webhooks import DeliveryOut
from tests.app.webhooks.conftest import KEY, Receiver
from tests.patience import patience

Deliver = Callable[..., int]

ROOT = Path(__file__).parents[3]
MOVED = {"alias": "production", "from": "v1", "to": "v2"}
CHILD = """
import threading
from app.db.engine import connect, sessions
from app.settings import Settings
from app.storage import open_store
from app.worker.claims import claim_delivery
from app.worker.runner import Runner
settings = Settings()
factory = sessions(connect(settings.database_url.get_secret_value()))
options = {"settings": settings, "sessions": factory, "store": open_store(settings), "stopping": threading.Event()}
Runner(**options, worker="child", claim=claim_delivery).work()
"""


@pytest.fixture
def webhook(factory: Sessions, receiver: Receiver) -> Webhook:
    with factory() as session:
        row = Webhook(url=receiver.url, events=["alias.moved"], created_by="test", secret_salt=new_salt())
        row.key_id = WebhookKey(KEY.encode()).id
        session.add(row)
        session.commit()
        return row


def move(factory: Sessions, *, times: int = 1) -> None:
    """Record the move of an alias, as `app.checkpoints.aliases` does."""
    with factory() as session:
        for _ in range(times):
            record(session, actor="key:1", action="alias.move", target="alias:emoji/production", details=MOVED)
        session.commit()


def delivery(factory: Sessions) -> DeliveryOut:
    """The one delivery, as the API shows it."""
    with factory() as session:
        row = session.scalars(select(WebhookDelivery)).one()
        return read_delivery(session, webhook_id=row.webhook_id, delivery_id=row.id)


def hook(factory: Sessions, webhook_id: UUID) -> Webhook:
    with factory() as session:
        return session.get_one(Webhook, webhook_id)


def end_waits(factory: Sessions) -> None:
    """Make every delivery due, and end the pauses."""
    with factory() as session:
        session.execute(update(Job).values(due_at=func.now()))
        session.execute(update(Webhook).values(paused_until=func.now()))
        session.commit()


def test_a_signed_event_arrives(factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver) -> None:
    move(factory)
    assert deliver() == 1
    ((headers, body),) = receiver.received
    secret = WebhookKey(KEY.encode()).secret(webhook.secret_salt)
    event = Verifier(secret).verify(body, headers)
    assert event["type"] == "alias.moved" and event["timestamp"]
    assert event["data"] == {
        "model": "emoji", "alias": "production", "from": "v1", "to": "v2", "moved_by": "key:1",
        "path": "/v1/models/emoji/aliases/production",
    }  # fmt: skip
    with pytest.raises(WebhookVerificationError):
        Verifier(secret).verify(body + b" ", headers)
    sent = delivery(factory)
    assert (sent.state, sent.tries, sent.next_try_at, sent.attempts[0].status) == ("delivered", 1, None, 204)
    assert sent.ended_at is not None
    assert deliver() == 0


def test_an_event_that_is_rolled_back_makes_no_delivery(factory: Sessions, webhook: Webhook) -> None:
    with factory() as session:
        record(session, actor="key:1", action="alias.move", target="alias:emoji/production", details=MOVED)
        session.rollback()
        assert session.scalars(select(WebhookDelivery)).all() == []


def test_an_event_without_subscriber_makes_no_delivery(factory: Sessions, webhook: Webhook) -> None:
    with factory() as session:
        details = {"commit": "c" * 40, "files": {}}
        record(session, actor="w", action="checkpoint.published", target="checkpoint:emoji/v1", details=details)
        session.commit()
        assert session.scalars(select(WebhookDelivery)).all() == []


def test_deliveries_arrive_in_the_order_of_their_events(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver
) -> None:
    move(factory, times=5)
    with factory() as session:
        ids = list(session.scalars(select(WebhookDelivery.message_id).order_by(WebhookDelivery.id)))
    assert deliver() == 5
    assert [headers["webhook-id"] for headers, _ in receiver.received] == ids


def test_a_delivery_is_retried_after_500_under_the_same_id(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver
) -> None:
    receiver.statuses = [500]
    move(factory)
    assert deliver() == 1
    assert delivery(factory).state == "pending" and delivery(factory).next_try_at is not None
    assert hook(factory, webhook.id).failing_since is not None
    assert deliver() == 0  # not before it is due
    end_waits(factory)
    assert deliver() == 1
    sent = delivery(factory)
    assert [(attempt.number, attempt.status) for attempt in sent.attempts] == [(1, 500), (2, 204)]
    assert sent.state == "delivered" and hook(factory, webhook.id).failing_since is None
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1


def test_the_delay_grows_with_each_attempt(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver
) -> None:
    receiver.statuses = [500] * len(DELAYS)
    move(factory)
    for delay in DELAYS:
        assert deliver() == 1
        with factory() as session:
            now = session.scalars(func.now().select()).one()
        due_at = delivery(factory).next_try_at
        assert due_at is not None
        assert 0.8 * delay - 5 < (due_at - now).total_seconds() <= 1.2 * delay
        end_waits(factory)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("retry_after", "seconds"), [("1800", 1800), ("a date", 1800), ("99999999", MAX_RETRY_AFTER)])
def test_retry_after_pauses_the_webhook(
    factory: Sessions,
    webhook: Webhook,
    receiver: Receiver,
    deliver: Deliver,
    status: int,
    retry_after: str,
    seconds: float,
) -> None:
    """The first delay would be five seconds. No other delivery is sent meanwhile."""
    if retry_after == "a date":
        retry_after = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    receiver.statuses, receiver.retry_after = [status], retry_after
    move(factory, times=2)
    assert deliver() == 1
    with factory() as session:
        now = session.scalars(func.now().select()).one()
        tried = session.scalars(select(Job).where(Job.attempt == 1)).one()
        paused_until = session.get_one(Webhook, webhook.id).paused_until
        assert paused_until is not None
        for until in (tried.due_at, paused_until):
            assert seconds - 300 < (until - now).total_seconds() <= seconds
    assert deliver() == 0


@pytest.mark.parametrize(("status", "retry_after"), [(500, "300"), (429, "soon"), (429, "-5"), (503, "1e9")])
def test_an_invalid_retry_after_is_ignored(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver, status: int, retry_after: str
) -> None:
    receiver.statuses, receiver.retry_after = [status], retry_after
    move(factory)
    assert deliver() == 1
    with factory() as session:
        now = session.scalars(func.now().select()).one()
        assert session.scalars(select(Job)).one().due_at - now < timedelta(seconds=60)


def test_after_a_rotation_both_secrets_verify_for_a_day(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver, settings: Settings
) -> None:
    before = WebhookKey(KEY.encode()).secret(webhook.secret_salt)
    with factory() as session:
        after = rotate_secret(session, webhook_id=webhook.id, settings=settings, actor="key:1").secret
        session.commit()
    assert after is not None and after != before
    move(factory)
    deliver()
    with factory() as session:
        session.execute(update(Webhook).values(previous_secret_expires_at=func.now()))
        session.commit()
    move(factory)
    deliver()
    (during, body), (later, later_body) = receiver.received
    for secret in (before, after):
        assert Verifier(secret).verify(body, during)["type"] == "alias.moved"
    assert Verifier(after).verify(later_body, later)["type"] == "alias.moved"
    with pytest.raises(WebhookVerificationError):
        Verifier(before).verify(later_body, later)


def test_a_failure_pauses_the_webhook(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver
) -> None:
    receiver.hanging.set()
    move(factory, times=3)
    assert deliver(lease_seconds=0.6) == 1
    assert deliver() == 0
    assert len(receiver.received) == 1
    receiver.released.set()


def test_a_delivery_fails_after_its_last_attempt(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver
) -> None:
    receiver.statuses = [500]
    move(factory)
    with factory() as session:
        session.execute(update(Job).values(attempt=len(DELAYS)))
        session.commit()
    assert deliver() == 1
    sent = delivery(factory)
    assert sent.state == "failed" and sent.ended_at is not None


def test_an_unexpected_error_is_a_failed_attempt(
    factory: Sessions, webhook: Webhook, deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver_webhook, "send", lambda *_, **__: 1 / 0)
    move(factory)
    assert deliver() == 1
    sent = delivery(factory)
    assert sent.state == "pending" and "Internal error" in (sent.attempts[0].error or "")


@pytest.mark.parametrize(("status", "since", "why"), [(410, None, "410 Gone"), (500, timedelta(days=6), "5 days")])
def test_a_webhook_is_disabled_with_an_audit_event(
    factory: Sessions,
    webhook: Webhook,
    receiver: Receiver,
    deliver: Deliver,
    status: int,
    since: timedelta | None,
    why: str,
) -> None:
    receiver.statuses = [status]
    move(factory, times=2)
    if since is not None:
        with factory() as session:
            session.execute(update(Webhook).values(failing_since=func.now() - since))
            session.commit()
    assert deliver() == 1
    found = hook(factory, webhook.id)
    assert not found.enabled and why in (found.disabled_reason or "")
    with factory() as session:
        assert {row.state for row in session.scalars(select(WebhookDelivery))} == {"failed"}
        assert set(session.scalars(select(Job.state))) == {"failed", "cancelled"}
        assert session.scalars(select(AuditEvent).where(AuditEvent.action == "webhook.disable")).one()


def test_a_worker_with_another_key_sends_nothing(
    factory: Sessions, webhook: Webhook, deliver: Deliver, settings: Settings
) -> None:
    move(factory)
    assert deliver(webhook_secret_key=type(settings.webhook_secret_key)("o" * 40)) == 0  # type: ignore[misc]
    assert delivery(factory).tries == 0


def test_a_webhook_that_is_deleted_during_an_attempt(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = vars(deliver_webhook)["send"]

    def delete_first(*arguments: object, **options: object) -> object:
        with factory() as session:
            delete_webhook(session, webhook_id=webhook.id, actor="key:1")
            session.commit()
        return send(*arguments, **options)

    monkeypatch.setattr(deliver_webhook, "send", delete_first)
    move(factory, times=2)
    assert deliver() == 1
    with factory() as session:
        assert set(session.scalars(select(Job.state))) == {"cancelled"}
        assert session.scalars(select(WebhookDelivery)).all() == []


def test_two_workers_never_call_a_receiver_at_once(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliverer: Callable[..., Runner]
) -> None:
    move(factory, times=20)

    def work() -> None:
        runner = deliverer()
        while len(receiver.received) < 20 and time.monotonic() < deadline:
            if not runner.work():
                time.sleep(0.02)

    deadline = time.monotonic() + patience(60)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receiver.most_at_once == 1
    assert len(receiver.received) == len({headers["webhook-id"] for headers, _ in receiver.received}) == 20


def test_a_backlog_of_one_webhook_does_not_delay_another(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliverer: Callable[..., Runner]
) -> None:
    move(factory, times=10)
    with factory() as session:
        other = Webhook(url=receiver.url + "/other", events=["alias.moved"], created_by="test", secret_salt=new_salt())
        other.key_id = webhook.key_id
        session.add(other)
        session.commit()
    move(factory)
    runner = deliverer()
    assert runner.work() and runner.work()
    with factory() as session:
        query = select(WebhookDelivery.state).where(WebhookDelivery.webhook_id == other.id)
        assert session.scalars(query).one() == "delivered"


def test_deliveries_are_deleted_30_days_after_their_end(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver
) -> None:
    move(factory, times=2)
    assert deliver() == 2
    move(factory)
    with factory() as session:
        old = session.scalars(select(Job.id).where(Job.state == "succeeded")).first()
        past = func.now() - timedelta(days=31)
        session.execute(update(Job).where(Job.id == old).values(finished_at=past))
        session.commit()
        assert queries.delete_old_deliveries(session) == 1
        session.commit()
        assert len(session.scalars(select(Job)).all()) == len(session.scalars(select(WebhookDelivery)).all()) == 2


@pytest.mark.fault
def test_a_delivery_of_a_killed_worker_is_sent_again(
    factory: Sessions, webhook: Webhook, receiver: Receiver, deliver: Deliver, settings: Settings
) -> None:
    receiver.hanging.set()
    move(factory)
    environment = to_environment(settings.model_copy(update={"lease_seconds": 4.0}))
    child = subprocess.Popen([sys.executable, "-c", CHILD], cwd=ROOT, env=environment, preexec_fn=die_with_parent())
    deadline = time.monotonic() + patience(120)
    while not receiver.received and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    receiver.hanging.clear()
    receiver.released.set()
    while not deliver() and time.monotonic() < deadline:
        with factory() as session:
            requeue_expired_jobs(session, max_attempts=5)
            session.commit()
        time.sleep(0.1)
    sent = delivery(factory)
    assert (sent.state, sent.tries, [attempt.number for attempt in sent.attempts]) == ("delivered", 2, [2])
    first, second = (json.dumps([headers["webhook-id"], body.decode()]) for headers, body in receiver.received)
    assert first == second
