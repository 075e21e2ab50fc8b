import json
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import Edit, Model, Webhook, WebhookDelivery


@pytest.fixture
def webhook(session: Session) -> None:
    """A webhook that subscribes to every event."""
    events = ["edit.ready", "edit.failed", "checkpoint.published", "alias.moved"]
    session.add(Webhook(url="https://a.example/", events=events, created_by="test", secret_salt=b"", key_id=""))
    session.flush()


def sent_event(session: Session) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(session.scalars(select(WebhookDelivery)).one().body)
    return body


@pytest.mark.parametrize("state", ["ready", "failed"])
def test_an_edit_that_is_ready_or_failed(session: Session, model: Model, webhook: None, state: str) -> None:
    edit = Edit(model_id=model.id, source="a", destination={"prompt": "b"}, templates=["{}"], settings={}, state=state)
    edit.created_by = "test"
    problem = {"title": "Diverged", "detail": "The loss was NaN.", "errors": []} if state == "failed" else None
    edit.problem = problem
    session.add(edit)
    session.flush()
    record(session, actor="worker", action=f"edit.{state}", target=f"edit:{edit.id}")
    event = sent_event(session)
    assert event["type"] == f"edit.{state}"
    assert (event["data"]["model"], event["data"]["source"], event["data"]["problem"]) == ("emoji", "a", problem)


def test_a_published_checkpoint(session: Session, webhook: None) -> None:
    details = {"commit": "c" * 40, "files": {}}
    record(session, actor="worker", action="checkpoint.published", target="checkpoint:emoji/v3", details=details)
    data = sent_event(session)["data"]
    path = "/v1/models/emoji/checkpoints/v3"
    assert data == {"model": "emoji", "version": "v3", "commit": "c" * 40, "path": path}


def test_a_deleted_alias(session: Session, webhook: None) -> None:
    details = {"alias": "production", "from": "v1", "to": None}
    record(session, actor="key:1", action="alias.delete", target="alias:emoji/production", details=details)
    assert (sent_event(session)["data"]["from"], sent_event(session)["data"]["to"]) == ("v1", None)
