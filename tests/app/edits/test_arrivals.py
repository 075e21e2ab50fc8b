"""Edits that are asked for at the same time: each is answered for itself, and all that was taken is in the ledger."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from app.audit.service import verify
from app.db.models import AuditEvent, Edit, Job, Model
from app.edits import arrivals
from tests.app.conftest import Headers

URL = "/v1/models/emoji/edits"
EDIT = {"source": "apple", "destination": {"prompt": "pear"}}


def counts(engine: Engine) -> set[int | None]:
    with Session(engine) as session:
        asked = select(func.count()).select_from(AuditEvent).where(AuditEvent.action == "edit.create")
        return {
            session.scalar(asked),
            *(session.scalar(select(func.count()).select_from(t)) for t in (Edit, Job)),
        }


def test_many_at_once_are_each_answered_for_themselves(
    live_client: TestClient, live_keys: Mapping[str, Headers], live_model: Model, engine: Engine
) -> None:
    ways = [
        (202, URL, EDIT, "edit"),
        (202, URL, EDIT, "admin"),
        (422, URL, EDIT | {"templates": ["no place"]}, "edit"),
        (404, URL.replace("emoji", "nobody"), EDIT, "edit"),
        (403, URL, EDIT, "read"),
    ]

    def ask(number: int) -> tuple[int, str, str | None]:
        expected, url, body, scope = ways[number % len(ways)]
        answer = live_client.post(url, headers=live_keys[scope], json=body)
        assert answer.status_code == expected, answer.text
        return expected, answer.headers["X-Request-ID"], answer.json().get("id")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(100)))
    taken = {request: f"edit:{edit}" for status, request, edit in answers if status == 202}
    assert len(taken) == 40 and counts(engine) == {40}
    with Session(engine) as session:
        told = select(AuditEvent.request_id, AuditEvent.target).where(AuditEvent.action == "edit.create")
        assert dict(session.execute(told).all()) == taken
        assert verify(session).valid
        owners = select(Job.created_by, func.count()).group_by(Job.created_by)
        assert sorted(count for _, count in session.execute(owners)) == [20, 20]


def test_what_cannot_be_audited_is_not_done(
    live_client: TestClient,
    live_keys: Mapping[str, Headers],
    live_model: Model,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.edits.service.record_all", lambda *_: 1 / 0)
    assert live_client.post(URL, headers=live_keys["edit"], json=EDIT).status_code == 500
    assert counts(engine) == {0}


def test_where_the_database_refuses_a_value_the_others_are_taken(
    live_client: TestClient,
    live_keys: Mapping[str, Headers],
    live_model: Model,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = arrivals.service.create_each

    def refusing(session: Session, *, asked: list[arrivals.Asked], **given: object) -> object:
        created = create(session, asked=asked, **given)
        if any(each.edit.source == "odd" for each in asked):
            raise DataError("", {}, ValueError("odd"))
        return created

    monkeypatch.setattr(arrivals.service, "create_each", refusing)

    def ask(number: int) -> int:
        body = EDIT | {"source": "odd" if number % 4 == 0 else "even"}
        return live_client.post(URL, headers=live_keys["edit"], json=body).status_code

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == [422, 202, 202, 202] * 5
    assert counts(engine) == {15}
