from collections.abc import Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Webhook
from app.settings import Settings
from tests.app.conftest import Headers

ASKED = {"url": "https://deploy.example/emender", "events": ["alias.moved", "checkpoint.published"]}
UNKNOWN = "00000000-0000-7000-8000-000000000000"


def create(client: TestClient, keys: Any, **given: Any) -> Any:
    answer = client.post("/v1/webhooks", headers=keys["admin"], json=ASKED | given)
    assert answer.status_code == 201, answer.text
    return answer.json()


class TestCreate:
    def test_the_secret_is_shown_once_and_not_stored(
        self, client: TestClient, keys: Mapping[str, Headers], session: Session
    ) -> None:
        headers = keys["admin"] | {"Idempotency-Key": "a"}
        first = client.post("/v1/webhooks", headers=headers, json=ASKED)
        created = first.json()
        assert first.headers["Cache-Control"] == "no-store"
        assert created["secret"].startswith("whsec_")
        assert client.post("/v1/webhooks", headers=headers, json=ASKED).json()["secret"] is None
        assert "secret" not in client.get(f"/v1/webhooks/{created['id']}", headers=keys["admin"]).json()
        row = session.scalars(select(Webhook)).one()
        assert created["secret"][6:].encode() not in row.secret_salt
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "webhook.create")).one()
        assert event.after is not None and event.after["host"] == "deploy.example:443"
        assert "emender" not in str(event.after)

    def test_without_a_key_the_problem_names_the_setting(
        self, client: TestClient, keys: Mapping[str, Headers], settings: Settings
    ) -> None:
        settings.webhook_secret_key = None
        answer = client.post("/v1/webhooks", headers=keys["admin"], json=ASKED)
        assert answer.status_code == 409
        assert "EMENDER_WEBHOOK_SECRET_KEY" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "url",
        [
            "", "ftp://a.example/", "https:/a.example", "https://user:pw@a.example/", "https://a.example:22/",
            "https://a.example:0/", "https://a.example:99999/", "https://a.example/#x", "https://bücher.example/",
            "https://a.example\\@b.example/", "https://a b.example/", "https://127.1/", "https://0x7f000001/",
            "https://2130706433/", "https://10.0.0.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/",
            "https://[fe80::1%25eth0]/", "https://a..example/", "https://a.example./", "http://8.8.8.8/", "https:///x",
            "https://a.example:/", "https://" + "a" * 2001,
        ],
    )  # fmt: skip
    def test_urls_that_are_refused(self, client: TestClient, keys: Mapping[str, Headers], url: str) -> None:
        answer = client.post("/v1/webhooks", headers=keys["admin"], json=ASKED | {"url": url})
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["pointer"] == "/url"

    @pytest.mark.parametrize("given", [{"events": []}, {"events": ["edit.created"]}, {"secret": "x"}])
    def test_invalid_bodies(self, client: TestClient, keys: Mapping[str, Headers], given: dict[str, Any]) -> None:
        assert client.post("/v1/webhooks", headers=keys["admin"], json=ASKED | given).status_code == 422


class TestUpdate:
    def test_disable_and_enable(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        url = f"/v1/webhooks/{create(client, keys)['id']}"
        ping = client.post(f"{url}/test", headers=keys["admin"])
        assert (ping.status_code, ping.json()["state"]) == (202, "pending")
        off = client.patch(url, headers=keys["admin"], json={"enabled": False}).json()
        assert off["enabled"] is False and off["disabled_reason"].startswith("Disabled by key:")
        assert client.get(f"{url}/deliveries", headers=keys["admin"]).json()["items"][0]["state"] == "failed"
        assert client.post(f"{url}/test", headers=keys["admin"]).status_code == 409
        assert client.patch(url, headers=keys["admin"], json={"enabled": True}).json()["disabled_reason"] is None

    def test_an_empty_change_is_refused(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        url = f"/v1/webhooks/{create(client, keys)['id']}"
        assert client.patch(url, headers=keys["admin"], json={}).status_code == 422

    def test_rotation_shows_another_secret(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        created = create(client, keys)
        rotated = client.post(f"/v1/webhooks/{created['id']}/rotate", headers=keys["admin"]).json()
        assert rotated["secret"].startswith("whsec_") and rotated["secret"] != created["secret"]


class TestDelete:
    def test_a_webhook_is_deleted_with_its_deliveries(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        url = f"/v1/webhooks/{create(client, keys)['id']}"
        client.post(f"{url}/test", headers=keys["admin"])
        assert client.delete(url, headers=keys["admin"]).status_code == 204
        assert client.get(url, headers=keys["admin"]).status_code == 404
        assert client.get(f"/v1/webhooks/{UNKNOWN}/deliveries", headers=keys["admin"]).status_code == 404
