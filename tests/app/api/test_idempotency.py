from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session

from app.api import idempotency
from app.db.models import AuditEvent, Edit, IdempotencyKey, Job, Model
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import Headers

URL = "/v1/models/emoji/edits"
EDIT = {"source": "dog", "destination": {"prompt": "cat"}}
KEY = {"Idempotency-Key": "one"}


def count(session: Session, table: Any = Edit) -> Any:
    return session.scalar(select(func.count()).select_from(table))


class TestReplay:
    def test_a_repeated_request_gets_the_first_response_and_creates_one_edit(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        first = client.post(URL, headers=keys["edit"] | KEY, json=EDIT)
        again = client.post(URL, headers=keys["edit"] | KEY, json=EDIT)
        assert "Idempotency-Replayed" not in first.headers
        assert again.headers["Idempotency-Replayed"] == "true"
        assert (again.status_code, again.content) == (202, first.content)
        assert again.headers["Location"] == first.headers["Location"]
        assert again.headers["Content-Type"] == first.headers["Content-Type"]
        assert (count(session), count(session, Job)) == (1, 1)

    def test_requests_without_a_key_are_independent(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        for _ in range(2):
            client.post(URL, headers=keys["edit"], json=EDIT)
        assert count(session) == 2

    def test_a_different_request_with_the_same_key_is_refused(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        client.post(URL, headers=keys["edit"] | KEY, json=EDIT)
        others = [
            (URL, EDIT | {"source": "bird"}),
            (URL + "?x=1", EDIT),
            (URL + "/batch", [EDIT]),
        ]
        for url, body in others:
            answer = client.post(url, headers=keys["edit"] | KEY, json=body)
            assert answer.status_code == 422
            assert answer.json()["errors"][0]["pointer"] == "Idempotency-Key"
        assert count(session) == 1

    def test_two_api_keys_may_use_the_same_key(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        client.post(URL, headers=keys["edit"] | KEY, json=EDIT)
        assert client.post(URL, headers=keys["admin"] | KEY, json=EDIT | {"source": "bird"}).status_code == 202
        assert count(session) == 2

    def test_an_invalid_request_does_not_use_up_the_key(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        bad = EDIT | {"templates": ["none"]}
        assert client.post(URL, headers=keys["edit"] | KEY, json=bad).status_code == 422
        assert count(session, IdempotencyKey) == 0
        assert client.post(URL, headers=keys["edit"] | KEY, json=EDIT).status_code == 202

    def test_a_replay_needs_the_scope_of_the_request(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model
    ) -> None:
        client.post(URL, headers=keys["edit"] | KEY, json=EDIT)
        assert client.post(URL, headers=keys["read"] | KEY, json=EDIT).status_code == 403

    def test_a_key_expires_after_a_day(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, session: Session
    ) -> None:
        def age(hours: Any) -> None:
            then = session.scalar(select(func.now() - timedelta(hours=hours)))
            session.execute(update(IdempotencyKey).values(created_at=then))
            session.commit()

        def post() -> Response:
            return client.post(URL, headers=keys["edit"] | KEY, json=EDIT)

        first = post()
        age(23)
        assert post().content == first.content
        assert idempotency.delete_expired(session) == 0
        age(25)
        assert post().content != first.content
        age(25)
        assert idempotency.delete_expired(session) == 1
        assert count(session, IdempotencyKey) == 0

    @pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é".encode()])
    def test_a_malformed_key_is_refused(
        self, client: TestClient, keys: Mapping[str, Headers], model: Model, key: Any
    ) -> None:
        answer = client.post(URL, headers=keys["edit"] | {"Idempotency-Key": key}, json=EDIT)
        assert answer.status_code == 422

    def test_a_secret_in_the_response_is_not_stored(
        self, client: TestClient, keys: Mapping[str, Headers], session: Session
    ) -> None:
        body = {"name": "deploy", "scopes": ["read"]}
        first = client.post("/v1/keys", headers=keys["admin"] | KEY, json=body).json()
        again = client.post("/v1/keys", headers=keys["admin"] | KEY, json=body).json()
        assert first["token"]
        assert again == first | {"token": None}
        kept = session.scalars(select(IdempotencyKey)).one()
        assert kept.body is not None and first["token"].split("_", 2)[2].encode() not in kept.body


class TestParallel:
    def test_fifty_concurrent_requests_create_one_edit(
        self, live_client: TestClient, live_keys: Mapping[str, Headers], live_model: Model, engine: Engine
    ) -> None:
        def post(_: Any) -> Any:
            return live_client.post(URL, headers=live_keys["edit"] | KEY, json=EDIT)

        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(post, range(50)))
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.content for answer in answers}) == 1
        assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
        with Session(engine) as session:
            assert (count(session), count(session, Job), count(session, IdempotencyKey)) == (1, 1, 1)
            made = select(func.count()).where(AuditEvent.action == "edit.create")
            assert session.scalar(made) == 1

    def test_a_request_whose_first_is_still_running_gets_409(
        self,
        settings: Settings,
        live_keys: Mapping[str, Headers],
        live_model: Model,
        engine: Engine,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Another transaction has inserted the key, as that of a running first request has."""
        monkeypatch.setattr("app.main.LOCK_SECONDS", 0.3)
        actor = "key:" + live_keys["edit"]["Authorization"].split("_")[1]
        with TestClient(create_app(settings)) as client, Session(engine) as first:
            first.execute(idempotency.CLAIM, {"principal": actor, "key": "one", "request_sha256": b""})
            answer = client.post(URL, headers=live_keys["edit"] | KEY, json=EDIT)
            assert answer.status_code == 409
            assert answer.headers["Retry-After"] == "1"
            first.rollback()  # as Postgres does if the process of the first request dies
            assert client.post(URL, headers=live_keys["edit"] | KEY, json=EDIT).status_code == 202

    def test_the_edit_is_rolled_back_if_the_response_cannot_be_stored(
        self,
        live_client: TestClient,
        live_keys: Mapping[str, Headers],
        live_model: Model,
        engine: Engine,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(idempotency, "STORE", text("SELECT no_such_column"))
            assert live_client.post(URL, headers=live_keys["edit"] | KEY, json=EDIT).status_code == 500
        with Session(engine) as session:
            assert (count(session), count(session, Job), count(session, IdempotencyKey)) == (0, 0, 0)
        assert live_client.post(URL, headers=live_keys["edit"] | KEY, json=EDIT).status_code == 202

    def test_more_concurrent_keys_than_connections_all_succeed(
        self, live_client: TestClient, live_keys: Mapping[str, Headers], live_model: Model, engine: Engine
    ) -> None:
        def post(number: Any) -> Any:
            key = {"Idempotency-Key": f"key-{number}"}
            return live_client.post(URL, headers=live_keys["edit"] | key, json=EDIT).status_code

        with ThreadPoolExecutor(120) as pool:
            statuses = list(pool.map(post, range(120)))
        assert set(statuses) == {202}
        with Session(engine) as session:
            assert (count(session), count(session, IdempotencyKey)) == (120, 120)
