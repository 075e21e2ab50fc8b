"""Keys are made, shown once and revoked."""

import re
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import ApiKey, AuditEvent
from tests.app.admin.conftest import Browser
from tests.app.admin.test_routes import HOSTILE, loaded, rows


def newest(session: Session) -> Any:
    return session.scalars(select(AuditEvent).order_by(AuditEvent.sequence.desc())).first()


def test_the_token_is_shown_once(admin: Browser, client: TestClient, session: Session) -> None:
    made = admin.submit("/admin/keys", "/admin/keys", **{"/name": HOSTILE, "/scopes": ["read", "apply"]})
    assert made.status_code == 201
    (token,) = re.findall(r'id="token" value="(em_[^"]+)"', made.text)
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert made.headers["Cache-Control"] == "no-store"
    secret = token.rpartition("_")[2]
    page = loaded(admin, "/admin/keys")
    assert secret not in page and secret not in loaded(admin, "/admin/audit")
    assert rows(page)[0].startswith("&lt;script&gt;")
    key = session.scalars(select(ApiKey).where(ApiKey.name == HOSTILE)).one()
    assert (key.scopes, newest(session).action) == (["read", "apply"], "key.create")


def test_what_is_wrong_stands_in_the_form(admin: Browser, session: Session) -> None:
    before = len(session.scalars(select(ApiKey)).all())
    fields = {"/name": HOSTILE, "/expires_at": "2020-01-01T00:00"}
    for scopes, said in (([], "Field required"), (["read"], "This time is in the past"), (["root"], "should be")):
        answer = admin.submit("/admin/keys", "/admin/keys", **fields | {"/scopes": scopes})
        assert (answer.status_code, said in answer.text) == (422, True), answer.text
        assert 'value="&lt;script&gt;' in answer.text and 'value="2020-01-01T00:00"' in answer.text
    assert len(session.scalars(select(ApiKey)).all()) == before


def test_revoke(admin: Browser, reader: Browser, session: Session) -> None:
    key = session.scalars(select(ApiKey).where(ApiKey.name == "test read")).one()
    url = f"/admin/keys/{key.id}/revoke"
    assert "you will be signed out" not in loaded(admin, url)
    assert admin.submit(url, url).headers["Location"] == "/admin/keys"
    assert (newest(session).action, newest(session).target) == ("key.revoke", f"key:{key.prefix}")
    assert reader.get("/admin/", follow_redirects=False).status_code == 303
    assert '<button class="danger"' not in loaded(admin, url)
    own = session.scalars(select(ApiKey).where(ApiKey.name == "test admin")).one()
    url = f"/admin/keys/{own.id}/revoke"
    assert "you will be signed out" in loaded(admin, url)
    admin.submit(url, url)
    assert admin.get("/admin/keys", follow_redirects=False).status_code == 303
