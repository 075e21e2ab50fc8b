"""Real deliveries to a real receiver; what the audit log is told is what receivers are told."""

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
from app.db.models import AuditEvent, Webhook, WebhookDelivery
from app.local.child_process import die_with_parent
from app.settings import Settings
from app.webhooks.sender import PAUSES, RETRY_AFTER_SECONDS, Sender
from app.webhooks.service import rotate_secret
from app.webhooks.signing import WebhookKey, new_salt
from tests.app.webhooks.conftest import KEY, Receiver

ROOT = Path(__file__).parents[3]
MOVED = {"alias": "production", "from": "v1", "to": "v2"}
CHILD = """
import sys, threading
from ipaddress import ip_network
from app.db.engine import connect, sessions
from app.webhooks.sender import Sender
from app.webhooks.signing import WebhookKey
factory = sessions(connect(sys.stdin.readline().strip()))
sender = Sender(factory, key=WebhookKey(sys.argv[1].encode()), networks=(ip_network("127.0.0.0/8"),), lease_seconds=4)
sender.run(stopping=threading.Event(), poll_seconds=0.1)
"""


@pytest.fixture
def webhook(factory: Sessions, receiver: Receiver) -> Webhook:
    with factory() as session:
        row = Webhook(url=receiver.url, events=["alias.moved"], created_by="test", salt=new_salt())
        row.key_id = WebhookKey(KEY.encode()).id
        session.add(row)
        session.commit()
        return row


def move(factory: Sessions, *, times: int = 1) -> None:
    """As `app.checkpoints.aliases` tells the audit log of a move."""
    with factory() as session:
        for _ in range(times):
            record(session, actor="key:1", action="alias.move", target="alias:emoji/production", details=MOVED)
        session.commit()


def delivery(factory: Sessions) -> WebhookDelivery:
    with factory() as session:
        return session.scalars(select(WebhookDelivery)).one()


def hook(factory: Sessions, webhook_id: UUID) -> Webhook:
    with factory() as session:
        return session.get_one(Webhook, webhook_id)


def hurry(factory: Sessions) -> None:
    """Let all pauses be over."""
    with factory() as session:
        session.execute(update(WebhookDelivery).values(due_at=func.now()))
        session.execute(update(Webhook).values(held_until=func.now()))
        session.commit()


def test_a_signed_event_arrives(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender]
) -> None:
    move(factory)
    assert sender().round(threading.Event())
    ((headers, body),) = receiver.received
    secret = WebhookKey(KEY.encode()).secret(webhook.salt)
    event = Verifier(secret).verify(body, headers)
    assert event["type"] == "alias.moved" and event["timestamp"]
    assert event["data"] == {
        "model": "emoji", "alias": "production", "from": "v1", "to": "v2", "moved_by": "key:1",
        "path": "/v1/models/emoji/aliases/production",
    }  # fmt: skip
    with pytest.raises(WebhookVerificationError):
        Verifier(secret).verify(body + b" ", headers)
    sent = delivery(factory)
    assert (sent.state, sent.tries, sent.attempts[0]["status"]) == ("delivered", 1, 204)
    assert not sender().round(threading.Event())


def test_what_is_rolled_back_is_not_announced(factory: Sessions, webhook: Webhook) -> None:
    with factory() as session:
        record(session, actor="key:1", action="alias.move", target="alias:emoji/production", details=MOVED)
        session.rollback()
        assert session.scalars(select(WebhookDelivery)).all() == []


def test_what_nobody_asked_for_makes_no_delivery(factory: Sessions, webhook: Webhook) -> None:
    with factory() as session:
        details = {"commit": "c" * 40, "files": {}}
        record(session, actor="w", action="checkpoint.published", target="checkpoint:emoji/v1", details=details)
        session.commit()
        assert session.scalars(select(WebhookDelivery)).all() == []


def test_tried_again_after_500_under_the_same_id(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender]
) -> None:
    receiver.statuses = [500]
    move(factory)
    sender().round(threading.Event())
    assert delivery(factory).state == "pending"
    assert hook(factory, webhook.id).failing_since is not None
    assert not sender().round(threading.Event())  # not before its pause is over
    hurry(factory)
    sender().round(threading.Event())
    sent = delivery(factory)
    assert [attempt["status"] for attempt in sent.attempts] == [500, 204]
    assert sent.state == "delivered" and hook(factory, webhook.id).failing_since is None
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("asked", "seconds"), [("1800", 1800), ("a date", 1800), ("99999999", RETRY_AFTER_SECONDS)])
def test_a_receiver_that_asks_for_patience_has_it(
    factory: Sessions,
    webhook: Webhook,
    receiver: Receiver,
    sender: Callable[..., Sender],
    status: int,
    asked: str,
    seconds: float,
) -> None:
    """The first pause would be five seconds; and no other delivery is sent meanwhile."""
    if asked == "a date":
        asked = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    receiver.statuses, receiver.retry_after = [status], asked
    move(factory, times=2)
    sender().round(threading.Event())
    with factory() as session:
        now = session.scalars(func.now().select()).one()
        (tried,) = session.scalars(select(WebhookDelivery).where(WebhookDelivery.tries == 1))
        for until in (tried.due_at, session.get_one(Webhook, webhook.id).held_until):
            assert seconds - 300 < (until - now).total_seconds() <= seconds
    assert not sender().round(threading.Event())


@pytest.mark.parametrize(("status", "asked"), [(500, "300"), (429, "soon"), (429, "-5"), (503, "1e9")])
def test_patience_that_was_not_asked_for_properly(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender], status: int, asked: str
) -> None:
    receiver.statuses, receiver.retry_after = [status], asked
    move(factory)
    sender().round(threading.Event())
    with factory() as session:
        now = session.scalars(func.now().select()).one()
        assert session.scalars(select(WebhookDelivery)).one().due_at - now < timedelta(seconds=60)


def test_after_a_rotation_both_secrets_verify_for_a_day(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender], settings: Settings
) -> None:
    before = WebhookKey(KEY.encode()).secret(webhook.salt)
    with factory() as session:
        after = rotate_secret(session, webhook_id=webhook.id, settings=settings, actor="key:1").secret
        session.commit()
    assert after is not None and after != before
    move(factory)
    sender().round(threading.Event())
    with factory() as session:
        session.execute(update(Webhook).values(previous_until=func.now()))
        session.commit()
    move(factory)
    sender().round(threading.Event())
    (during, body), (later, later_body) = receiver.received
    for secret in (before, after):
        assert Verifier(secret).verify(body, during)["type"] == "alias.moved"
    assert Verifier(after).verify(later_body, later)["type"] == "alias.moved"
    with pytest.raises(WebhookVerificationError):
        Verifier(before).verify(later_body, later)


def test_after_a_failure_the_receiver_is_left_in_peace(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender]
) -> None:
    receiver.hanging.set()
    move(factory, times=3)
    sender(lease_seconds=0.6).round(threading.Event())
    assert not sender().round(threading.Event())
    assert len(receiver.received) == 1
    receiver.released.set()


def test_gives_up_after_the_last_try(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender]
) -> None:
    receiver.statuses = [500]
    move(factory)
    with factory() as session:
        session.execute(update(WebhookDelivery).values(tries=len(PAUSES)))
        session.commit()
    sender().round(threading.Event())
    sent = delivery(factory)
    assert sent.state == "failed" and sent.ended_at is not None


@pytest.mark.parametrize(("status", "since", "why"), [(410, None, "410 Gone"), (500, timedelta(days=6), "5 days")])
def test_disabled_with_an_audit_event(
    factory: Sessions,
    webhook: Webhook,
    receiver: Receiver,
    sender: Callable[..., Sender],
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
    sender().round(threading.Event())
    found = hook(factory, webhook.id)
    assert not found.enabled and why in (found.disabled_reason or "")
    with factory() as session:
        assert {row.state for row in session.scalars(select(WebhookDelivery))} == {"failed"}
        assert session.scalars(select(AuditEvent).where(AuditEvent.action == "webhook.disable")).one()


def test_another_key_leaves_the_webhook_alone(factory: Sessions, webhook: Webhook, receiver: Receiver) -> None:
    move(factory)
    other = Sender(factory, key=WebhookKey(b"o" * 40))
    assert not other.round(threading.Event())
    assert delivery(factory).tries == 0


def test_two_senders_never_call_a_receiver_at_once(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender]
) -> None:
    move(factory, times=20)
    stopping = threading.Event()
    threads = [
        threading.Thread(target=sender().run, kwargs={"stopping": stopping, "poll_seconds": 0.05}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(receiver.received) < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    stopping.set()
    for thread in threads:
        thread.join()
    assert len(receiver.received) == len({headers["webhook-id"] for headers, _ in receiver.received}) == 20


@pytest.mark.fault
def test_what_a_killed_sender_was_sending_is_sent_by_another(
    factory: Sessions, webhook: Webhook, receiver: Receiver, sender: Callable[..., Sender], database_url: str
) -> None:
    receiver.hanging.set()
    move(factory)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, KEY], cwd=ROOT, stdin=subprocess.PIPE, preexec_fn=die_with_parent()
    )
    assert child.stdin is not None
    child.stdin.write(database_url.encode() + b"\n")
    child.stdin.close()
    deadline = time.monotonic() + 60
    while not receiver.received and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    receiver.hanging.clear()
    receiver.released.set()
    while not sender().round(threading.Event()) and time.monotonic() < deadline:
        time.sleep(0.1)
    sent = delivery(factory)
    assert (sent.state, sent.tries) == ("delivered", 2)
    first, second = (json.dumps([headers["webhook-id"], body.decode()]) for headers, body in receiver.received)
    assert first == second
