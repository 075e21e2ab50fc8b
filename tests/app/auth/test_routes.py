from collections.abc import Mapping

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import ApiKey, AuditEvent
from tests.app.conftest import Headers


class TestCreateKey:
    def test_anonymous(self, client: TestClient) -> None:
        answer = client.post("/v1/keys", json={"name": "a", "scopes": ["read"]})
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["Content-Type"] == "application/problem+json"

    def test_other_scopes(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        for scope in ("read", "edit", "apply"):
            assert (
                client.post("/v1/keys", headers=keys[scope], json={"name": "a", "scopes": ["read"]}).status_code == 403
            )

    def test_token_works_and_is_not_kept(
        self, client: TestClient, keys: Mapping[str, Headers], session: Session
    ) -> None:
        answer = client.post("/v1/keys", headers=keys["admin"], json={"name": "deploy", "scopes": ["apply", "read"]})
        assert answer.status_code == 201
        created = answer.json()
        assert created["scopes"] == ["read", "apply"]
        assert created["token"].startswith(f"em_{created['prefix']}_")
        secret = created["token"].split("_", 2)[2]

        listed = client.get("/v1/models", headers={"Authorization": f"Bearer {created['token']}"})
        assert listed.status_code == 200

        row = session.scalars(select(ApiKey).where(ApiKey.prefix == created["prefix"])).one()
        created_keys = select(AuditEvent).where(AuditEvent.action == "key.create")
        event = session.scalars(created_keys.order_by(AuditEvent.sequence)).all()[-1]
        assert secret.encode() not in row.secret_sha256
        assert secret not in str(event.details)
        assert event.details == {"name": "deploy", "scopes": ["read", "apply"]}

    def test_unknown_scope(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        answer = client.post("/v1/keys", headers=keys["admin"], json={"name": "a", "scopes": ["read", "root"]})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == "/scopes/1"

    @pytest.mark.parametrize(
        "moment", [1900000000, "1900000000", "2099-01-01T00:00:00", "soon", "2020-01-01T00:00:00Z"]
    )
    def test_odd_ends(self, client: TestClient, keys: Mapping[str, Headers], moment: int | str) -> None:
        body = {"name": "a", "scopes": ["read"], "expires_at": moment}
        answer = client.post("/v1/keys", headers=keys["admin"], json=body)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/expires_at")

    def test_nul_in_name(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        answer = client.post("/v1/keys", headers=keys["admin"], json={"name": "a\0", "scopes": ["read"]})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == "/name"


class TestListKeys:
    def test_pages_newest_first(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        first = client.get("/v1/keys?limit=3", headers=keys["admin"])
        assert [key["name"] for key in first.json()["items"]] == ["test admin", "test apply", "test edit"]
        assert "token" not in first.json()["items"][0]
        second = client.get(first.links["next"]["url"], headers=keys["admin"])
        assert [key["name"] for key in second.json()["items"]] == ["test read"]
        assert second.json()["next"] is None
        assert "next" not in second.links

    def test_bad_cursor(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        assert client.get("/v1/keys?cursor=!!!", headers=keys["admin"]).status_code == 422


class TestRevokeKey:
    def test_revoked_key_is_refused_and_stays_listed(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        created = client.post("/v1/keys", headers=keys["admin"], json={"name": "gone", "scopes": ["read"]}).json()
        headers = {"Authorization": f"Bearer {created['token']}"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        for _ in range(2):
            assert client.delete(f"/v1/keys/{created['id']}", headers=keys["admin"]).status_code == 204
        assert client.get("/v1/models", headers=headers).status_code == 401
        listed = client.get("/v1/keys", headers=keys["admin"]).json()["items"]
        assert next(key for key in listed if key["id"] == created["id"])["revoked_at"] is not None

    def test_unknown(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        answer = client.delete("/v1/keys/00000000-0000-7000-8000-000000000000", headers=keys["admin"])
        assert answer.status_code == 404
