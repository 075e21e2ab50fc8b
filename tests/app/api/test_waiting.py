"""The long poll and the stream of events, of every resource that has work behind it."""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session, sessionmaker

from app.api import waiting
from app.db.models import Edit, Job, Model
from app.settings import Settings
from app.storage.local import LocalStore
from tests.app.conftest import Headers
from tests.seeded import seed

EDIT = {"source": "dog", "destination": {"prompt": "cat"}}


@pytest.fixture
def live(
    live_client: TestClient, live_model: Model, live_keys: Mapping[str, Headers]
) -> tuple[TestClient, Headers, str]:
    """An edit in a database of its own, which other connections can change."""
    edit = live_client.post("/v1/models/emoji/edits", headers=live_keys["edit"], json=EDIT).json()
    return live_client, live_keys["read"], edit["id"]


def change(engine: Any, *, state: Any, **job: Any) -> None:
    with Session(engine) as session:
        session.execute(update(Edit).values(state=state))
        if job:
            session.execute(update(Job).values(**job))
        session.commit()


def parse(stream: Any) -> Any:
    events = []
    for block in stream.split("\n\n"):
        if block.strip() and not block.startswith(":"):
            events.append(dict(line.split(": ", 1) for line in block.splitlines()))
    return events


PATHS = {
    "model": "/v1/models/{model}",
    "statistics": "/v1/models/{model}/statistics/{statistics_id}",
    "edit": "/v1/edits/{edit_id}",
    "checkpoint": "/v1/models/{model}/checkpoints/{revision}",
    "evaluation": "/v1/models/{model}/checkpoints/{revision}/evaluations/{evaluation_id}",
}


@pytest.mark.parametrize("resource", PATHS)
def test_a_resource_can_be_waited_for_and_followed(
    resource: Any,
    client: TestClient,
    session: Session,
    store: LocalStore,
    keys: Mapping[str, Headers],
    tmp_path: Path,
    settings: Settings,
) -> None:
    settings.webhook_secret_key = SecretStr("k" * 40)
    path = PATHS[resource].format(**seed(session, client, keys, store=store, folder=tmp_path / "tokenizer").parameters)
    if resource == "evaluation":
        assert client.get(path, headers=keys["read"] | {"Prefer": "wait=1"}).json()["state"] == "queued"
        client.post(f"{path}/cancel", headers=keys["apply"])
    answer = client.get(path, headers=keys["read"] | {"Prefer": "wait=30"})
    assert answer.headers["Preference-Applied"] == "wait=30"
    stream = client.get(f"{path}/events", headers=keys["read"])
    (event,) = parse(stream.text)
    status = json.loads(event["data"])
    assert status["state"] == answer.json()["state"]
    assert client.get(f"{path}/events", headers=keys["read"] | {"Last-Event-ID": event["id"]}).status_code == 204


class TestWait:
    def test_the_response_comes_once_the_edit_is_ready(
        self, live: tuple[TestClient, Headers, str], engine: Engine
    ) -> None:
        client, headers, edit_id = live
        timer = threading.Timer(0.7, change, args=(engine,), kwargs={"state": "ready"})
        timer.start()
        started = time.monotonic()
        answer = client.get(f"/v1/edits/{edit_id}", headers=headers | {"Prefer": "respond-async, wait=30"})
        timer.join()
        assert answer.json()["state"] == "ready"
        assert 0.7 <= time.monotonic() - started < 25
        assert answer.headers["Preference-Applied"] == "wait=30"

    def test_the_response_comes_after_the_preferred_time(self, live: tuple[TestClient, Headers, str]) -> None:
        client, headers, edit_id = live
        started = time.monotonic()
        answer = client.get(f"/v1/edits/{edit_id}", headers=headers | {"Prefer": "wait=1"})
        assert answer.json()["state"] == "queued"
        assert time.monotonic() - started >= 1

    def test_a_request_without_the_preference_does_not_wait(self, live: tuple[TestClient, Headers, str]) -> None:
        client, headers, edit_id = live
        assert "Preference-Applied" not in client.get(f"/v1/edits/{edit_id}", headers=headers).headers

    def test_other_requests_succeed_while_many_wait(self, live: tuple[TestClient, Headers, str]) -> None:
        """More requests wait than there are threads and connections."""
        client, headers, edit_id = live
        threads = [
            threading.Thread(
                target=client.get, args=(f"/v1/edits/{edit_id}",), kwargs={"headers": headers | {"Prefer": "wait=4"}}
            )
            for _ in range(60)
        ]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert sum(thread.is_alive() for thread in threads) > 40
        for thread in threads:
            thread.join()

    def test_no_more_than_the_maximum_wait(
        self, live: tuple[TestClient, Headers, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, headers, edit_id = live
        monkeypatch.setattr(waiting, "MAX_WAITING", 0)
        answer = client.get(f"/v1/edits/{edit_id}", headers=headers | {"Prefer": "wait=30"})
        assert answer.status_code == 200 and "Preference-Applied" not in answer.headers
        refused = client.get(f"/v1/edits/{edit_id}/events", headers=headers)
        assert refused.status_code == 503 and "Retry-After" in refused.headers

    def test_reads_are_rarer_the_more_requests_wait(self) -> None:
        watcher = waiting.StatusWatcher(sessionmaker())
        assert watcher._poll_seconds == waiting.POLL_SECONDS
        watcher.waiting = 10 * waiting.READS_PER_SECOND
        assert watcher._poll_seconds == 10


class TestEvents:
    def test_the_stream_has_each_change_until_the_edit_is_ready(
        self, live: tuple[TestClient, Headers, str], engine: Engine
    ) -> None:
        client, headers, edit_id = live

        def work() -> None:
            time.sleep(0.8)
            change(engine, state="optimizing", attempt=1, progress={"stage": "optimizing", "done": 1, "total": 2})
            time.sleep(0.8)
            change(engine, state="optimizing", progress={"stage": "optimizing", "done": 2, "total": 2})
            time.sleep(0.8)
            change(engine, state="ready")

        with Session(engine) as session:
            session.execute(update(Job).values(state="running"))
            session.commit()
        worker = threading.Thread(target=work)
        worker.start()
        answer = client.get(f"/v1/edits/{edit_id}/events", headers=headers)
        worker.join()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = parse(answer.text)
        assert [event["event"] for event in events][:2] == ["state", "state"]
        assert events[-1]["event"] == "state"
        assert '"ready"' in events[-1]["data"]
        assert any(event["event"] == "progress" and '"done":2' in event["data"] for event in events)
        assert len({event["id"] for event in events}) == len(events)

    def test_the_last_event_id_resumes_the_stream(self, live: tuple[TestClient, Headers, str], engine: Engine) -> None:
        client, headers, edit_id = live
        change(engine, state="failed")
        first = parse(client.get(f"/v1/edits/{edit_id}/events", headers=headers).text)
        assert len(first) == 1
        again = client.get(f"/v1/edits/{edit_id}/events", headers=headers | {"Last-Event-ID": "of long ago"})
        assert parse(again.text) == first
        known = client.get(f"/v1/edits/{edit_id}/events", headers=headers | {"Last-Event-ID": first[0]["id"]})
        assert (known.status_code, known.text) == (204, "")

    def test_an_unknown_edit_gets_404(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        answer = client.get("/v1/edits/00000000-0000-7000-8000-000000000000/events", headers=keys["read"])
        assert answer.status_code == 404
        assert answer.headers["Content-Type"] == "application/problem+json"
