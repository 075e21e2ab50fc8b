import csv
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import AuditEvent
from tests.app.conftest import Headers
from tests.conftest import rewritable_history


@pytest.fixture
def events(session: Session, keys: Mapping[str, Headers]) -> None:
    """Four events of making keys, then these."""
    record(session, actor="key:a", action="edit.create", target="edit:1", details={"reason": "=1+1", "weight": 1e22})
    record(session, actor="key:b", action="edit.cancel", target="edit:1")
    record(session, actor="worker", action="edit.ready", target="edit:2", details={"value": 0.1, "name": 'é, "x"'})
    session.commit()


class TestListEvents:
    def test_scopes(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert client.get("/v1/audit").status_code == 401
        for scope in ("read", "edit", "apply"):
            assert client.get("/v1/audit", headers=keys[scope]).status_code == 403
            assert client.get("/v1/audit/verify", headers=keys[scope]).status_code == 403

    def test_newest_first_in_pages(self, client: TestClient, keys: Mapping[str, Headers], events: None) -> None:
        url: str | None = "/v1/audit?limit=3"
        seen: list[int] = []
        while url:
            answer = client.get(url, headers=keys["admin"])
            seen += [event["sequence"] for event in answer.json()["items"]]
            url = answer.links["next"]["url"] if "next" in answer.links else None
        assert seen == [7, 6, 5, 4, 3, 2, 1]

    def test_filters(self, client: TestClient, keys: Mapping[str, Headers], events: None) -> None:
        def found(**filters: Any) -> Any:
            items = client.get("/v1/audit", headers=keys["admin"], params=filters).json()["items"]
            return [event["action"] for event in items]

        assert found(actor="key:b") == ["edit.cancel"]
        assert found(action="edit.ready") == ["edit.ready"]
        assert found(target="edit:1") == ["edit.cancel", "edit.create"]
        assert found(target="edit:1", actor="key:a") == ["edit.create"]
        now = datetime.now(UTC)
        assert found(since=(now + timedelta(minutes=1)).isoformat()) == []
        assert len(found(since=(now - timedelta(minutes=1)).replace(tzinfo=None).isoformat())) == 7

    def test_bad_filters(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        for query in ("since=yesterday", "since=0", "until=1e9", "cursor=x", "actor=%00", "limit=501"):
            assert client.get(f"/v1/audit?{query}", headers=keys["admin"]).status_code == 422, query

    def test_ndjson(self, client: TestClient, keys: Mapping[str, Headers], events: None) -> None:
        answer = client.get("/v1/audit?target=edit:1", headers=keys["admin"] | {"Accept": "application/x-ndjson"})
        assert answer.headers["Content-Type"].startswith("application/x-ndjson")
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["action"] for line in lines] == ["edit.create", "edit.cancel"]
        assert lines[1]["previous_hash"] == lines[0]["hash"]

    def test_csv(self, client: TestClient, keys: Mapping[str, Headers], events: None) -> None:
        answer = client.get("/v1/audit", headers=keys["admin"] | {"Accept": "text/csv"})
        rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
        assert [int(row["sequence"]) for row in rows] == [1, 2, 3, 4, 5, 6, 7]
        assert json.loads(rows[6]["details"]) == {"value": 0.1, "name": 'é, "x"'}


class TestVerify:
    def verify(self, client: TestClient, keys: Any) -> Any:
        return client.get("/v1/audit/verify", headers=keys["admin"]).json()

    def test_whole(self, client: TestClient, keys: Mapping[str, Headers], events: None) -> None:
        found = self.verify(client, keys)
        last = client.get("/v1/audit?limit=1", headers=keys["admin"]).json()["items"][0]
        assert found == {"valid": True, "events": 7, "head": last["hash"], "broken_at": None, "reason": None}

    def test_empty(self, session: Session) -> None:
        from app.audit.service import verify

        assert verify(session).model_dump() == {
            "valid": True, "events": 0, "head": None, "broken_at": None, "reason": None,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "broken_at", "reason"),
        [
            (update(AuditEvent).where(AuditEvent.sequence == 6).values(actor="key:c"), 6, "changed"),
            (update(AuditEvent).where(AuditEvent.sequence == 5).values(details={"reason": "better"}), 5, "changed"),
            (update(AuditEvent).where(AuditEvent.sequence == 6).values(previous_hash=bytes(32)), 6, "event before"),
            (delete(AuditEvent).where(AuditEvent.sequence == 6), 7, "event 6 is missing"),
            (delete(AuditEvent).where(AuditEvent.sequence == 1), 2, "event 1 is missing"),
        ],
    )
    def test_broken(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        events: None,
        session: Session,
        change: Any,
        broken_at: int,
        reason: str,
    ) -> None:
        with rewritable_history(session.connection()):
            session.execute(change)
        session.commit()
        found = self.verify(client, keys)
        assert (found["valid"], found["broken_at"]) == (False, broken_at)
        assert reason in found["reason"]
