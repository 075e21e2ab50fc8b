"""Sessions, their cookies, forms that are not ours, and the scope of each page."""

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.admin.application import ROUTERS
from app.api.rate_limit import RateLimits
from app.auth import browser_sessions
from app.auth.service import create_key
from app.db.models import ApiKey, BrowserSession
from app.settings import Settings
from tests.app.admin.conftest import Browser
from tests.app.conftest import Headers

pytestmark = pytest.mark.security

NOBODY = {"Authorization": "Bearer em_000000000000_" + "x" * 43}
UUID = "00000000-0000-7000-8000-000000000000"
OPEN = {"/sign-in", "/sign-out"}
EDIT = {"/models/{model}/edits/new", "/models/{model}/edits", "/edits/{edit_id}/cancel", "/edits/{edit_id}/retry"}
APPLY = {
    "/models/{model}/apply",
    "/models/{model}/move-alias",
    "/models/{model}/checkpoints/{revision}/evaluations/new",
    "/models/{model}/checkpoints/{revision}/evaluations",
    "/models/{model}/checkpoints/{revision}/evaluations/{evaluation_id}/cancel",
}
ADMIN = {
    "/audit",
    "/audit/export",
    "/keys",
    "/keys/{key_id}/revoke",
    "/models/{model}/statistics",
    "/models/{model}/checkpoints/{version}/retract",
}
MORE_THAN_READ = (EDIT | APPLY | ADMIN) - {"/models/{model}/edits"}  # a list, by GET


def pages(method: str = "GET") -> Iterator[Any]:
    """The path of each page, with names that nothing has."""
    place = dict.fromkeys(("evaluation_id", "edit_id", "key_id"), UUID)
    place |= {"revision": "v1", "version": "v1", "image_id": "sha256:" + "0" * 64}
    for route in (route for router in ROUTERS for route in router.routes):
        if method in route.methods:
            path = re.sub(r"\{(\w+)(?::path)?\}", lambda match: place.get(match[1], "nothing"), route.path)
            yield route.path, "/admin" + path


class TestSignIn:
    def test_leads_to_the_page_that_was_asked_for(self, browser: Browser, keys: Mapping[str, Headers]) -> None:
        sent = browser.get("/admin/models/emoji/edits?state=ready", follow_redirects=False)
        assert sent.status_code == 303
        page = browser.get(sent.headers["Location"])
        assert 'value="models/emoji/edits?state=ready"' in page.text
        answer = browser.sign_in(keys["read"], to="models/emoji/edits?state=ready")
        assert (answer.status_code, answer.headers["Location"]) == (303, "/admin/models/emoji/edits?state=ready")

    @pytest.mark.parametrize("to", ["//evil.example", "https://evil.example", "\\\\evil.example", "/\\evil.example"])
    def test_leads_to_no_other_site(self, browser: Browser, keys: Mapping[str, Headers], to: str) -> None:
        assert browser.sign_in(keys["read"], to=to).headers["Location"].startswith("/admin/")

    def test_the_cookie_is_no_key_and_the_database_has_only_its_hash(
        self, browser: Browser, keys: Mapping[str, Headers], session: Session
    ) -> None:
        answer = browser.sign_in(keys["admin"])
        cookie = answer.headers["Set-Cookie"]
        for attribute in ("HttpOnly", "SameSite=strict", "Path=/admin", "Max-Age=43200"):
            assert attribute in cookie
        assert "Secure" not in cookie
        assert keys["admin"]["Authorization"].rpartition("_")[2] not in cookie
        row = session.scalars(select(BrowserSession)).one()
        assert browser.cookies["emender_session"].encode() not in row.token_sha256
        assert len(row.token_sha256) == 32

    def test_secure_by_https(self, application: FastAPI, keys: Mapping[str, Headers]) -> None:
        browser = Browser(application, base_url="https://testserver", raise_server_exceptions=False)
        assert "Secure" in browser.sign_in(keys["read"]).headers["Set-Cookie"]
        assert browser.get("/admin/").status_code == 200

    def test_begins_under_a_new_token(self, browser: Browser, keys: Mapping[str, Headers]) -> None:
        browser.get("/admin/sign-in")
        before = browser.cookies["emender_session"]
        browser.sign_in(keys["read"])
        assert browser.cookies["emender_session"] != before

    def test_wrong_key(self, browser: Browser) -> None:
        answer = browser.sign_in(NOBODY)
        assert answer.status_code == 401
        assert "unknown, revoked or expired" in answer.text
        assert "x" * 43 not in answer.text
        assert browser.get("/admin/", follow_redirects=False).status_code == 303

    def test_a_key_that_may_not_read(self, browser: Browser, keys: Mapping[str, Headers], session: Session) -> None:
        answer = browser.sign_in(keys["apply"])
        assert answer.status_code == 403
        assert session.scalar(select(func.count()).select_from(BrowserSession)) == 0

    def test_wrong_keys_count_against_their_address(
        self, browser: Browser, application: FastAPI, settings: Settings, keys: Mapping[str, Headers]
    ) -> None:
        limited = settings.model_copy(update={"failed_auth_rate_limit": "3/minute"})
        application.state.rate_limits = RateLimits(limited)
        statuses = [browser.sign_in(NOBODY).status_code for _ in range(5)]
        assert statuses[0] == 401
        assert statuses[-1] == 429
        api = browser.get("/v1/models", headers=NOBODY)  # one count for both ways in
        assert api.status_code == 429


class TestSession:
    def test_ends_by_signing_out(self, reader: Browser) -> None:
        cookie = reader.cookies["emender_session"]
        assert reader.submit("/admin/", "/admin/sign-out").status_code == 303
        assert "emender_session" not in reader.cookies
        again = reader.get("/admin/", headers={"Cookie": f"emender_session={cookie}"}, follow_redirects=False)
        assert again.status_code == 303

    def test_expires(self, reader: Browser, session: Session) -> None:
        assert reader.get("/admin/").status_code == 200
        session.execute(update(BrowserSession).values(expires_at=func.now() - timedelta(seconds=1)))
        session.commit()
        assert reader.get("/admin/", follow_redirects=False).status_code == 303

    def test_the_expired_are_deleted_when_another_begins(self, reader: Browser, session: Session) -> None:
        session.execute(update(BrowserSession).values(expires_at=func.now() - timedelta(seconds=1)))
        browser_sessions.begin_session(session, key_id=session.scalars(select(ApiKey.id).limit(1)).one())
        assert session.scalar(select(func.count()).select_from(BrowserSession)) == 1

    def test_ends_with_its_key(
        self, reader: Browser, client: TestClient, keys: Mapping[str, Headers], session: Session
    ) -> None:
        key = session.scalars(select(ApiKey).where(ApiKey.name == "test read")).one()
        assert client.delete(f"/v1/keys/{key.id}", headers=keys["admin"]).status_code == 204
        assert reader.get("/admin/", follow_redirects=False).status_code == 303

    def test_expires_with_its_key(self, browser: Browser, session: Session) -> None:
        key, token = create_key(session, name="brief", scopes=["read"], actor="test")
        session.commit()
        browser.sign_in({"Authorization": f"Bearer {token}"})
        assert browser.get("/admin/").status_code == 200
        session.execute(update(ApiKey).where(ApiKey.id == key.id).values(expires_at=func.now()))
        session.commit()
        assert browser.get("/admin/", follow_redirects=False).status_code == 303

    def test_opens_no_call_of_the_api(self, admin: Browser) -> None:
        assert (
            admin.get(
                "/v1/models", headers={"Cookie": f"emender_session={admin.cookies['emender_session']}"}
            ).status_code
            == 401
        )

    def test_a_guess_is_counted_for_its_address(
        self, browser: Browser, application: FastAPI, settings: Settings
    ) -> None:
        application.state.rate_limits = RateLimits(settings.model_copy(update={"rate_limit": "3/minute"}))
        statuses = [
            browser.get("/admin/", headers={"Cookie": f"emender_session={n}"}, follow_redirects=False).status_code
            for n in range(5)
        ]
        assert statuses[0] == 303
        assert statuses[-1] == 429


class TestForms:
    @pytest.mark.parametrize("action", ["/admin/sign-in", "/admin/sign-out"])
    def test_of_another_site_are_refused(self, reader: Browser, keys: Mapping[str, Headers], action: str) -> None:
        key = keys["read"]["Authorization"].removeprefix("Bearer ")
        for fields in ({}, {"form_token": "0" * 64}, {"form_token": "é"}):
            answer = reader.post(action, data={"key": key, **fields}, follow_redirects=False)
            assert answer.status_code == 403
            assert "form does not belong to your session" in answer.text
        assert reader.get("/admin/").status_code == 200

    def test_of_another_session_are_refused(self, reader: Browser, admin: Browser) -> None:
        theirs = re.search(r'name="form_token" value="(\w+)"', admin.get("/admin/").text)
        assert theirs is not None
        assert reader.post("/admin/sign-out", data={"form_token": theirs[1]}).status_code == 403

    def test_every_form_is_checked(self, admin: Browser) -> None:
        for path, url in pages("POST"):
            for fields in ({}, {"form_token": "0" * 64}):
                answer = admin.post(url, data=fields, follow_redirects=False)
                assert (answer.status_code, "form does not belong" in answer.text) == (403, True), path

    def test_each_needs_its_scope(self, signed_in_with: Callable[..., Browser]) -> None:
        needed = {
            path: scope for scope, paths in (("edit", EDIT), ("apply", APPLY), ("admin", ADMIN)) for path in paths
        }
        for scopes in (["read"], ["read", "edit"], ["read", "apply"], ["admin"]):
            browser = signed_in_with(*scopes)
            for path, url in pages("POST"):
                if path in OPEN:
                    continue
                answer = browser.submit("/admin/", url)
                lets_through = needed[path] in scopes or "admin" in scopes
                assert (answer.status_code == 403) == (not lets_through), (path, scopes, answer.text)
                assert answer.status_code < 500, path
                assert lets_through or "needs the scope" in answer.text


class TestPages:
    def test_each_needs_a_session(self, browser: Browser) -> None:
        for path, url in pages():
            answer = browser.get(url, follow_redirects=False)
            assert answer.status_code == (200 if path in OPEN else 303), path

    def test_each_needs_its_scope(self, reader: Browser, admin: Browser) -> None:
        for path, url in pages():
            if path not in OPEN:
                assert (reader.get(url).status_code == 403) == (path in MORE_THAN_READ), path
                assert admin.get(url).status_code in (200, 404), path

    def test_a_scope_that_was_taken_away(self, reader: Browser, session: Session) -> None:
        session.execute(update(ApiKey).where(ApiKey.name == "test read").values(scopes=["edit"]))
        session.commit()
        answer = reader.get("/admin/")
        assert answer.status_code == 403
        assert "needs the scope" in answer.text

    def test_each_has_a_policy_and_is_kept_nowhere(self, admin: Browser) -> None:
        """Only the overview of these runs a script: one file of ours."""
        for path, url in pages():
            answer = admin.get(url)
            policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == "'none'", path
            live = path == "/"
            assert (policy.get("script-src"), policy.get("connect-src")) == (("'self'",) * 2 if live else (None, None))
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", answer.text), path
            scripts = re.findall(r"<script[^>]*>.*?</script>", answer.text, re.DOTALL)
            assert len(scripts) == live, path
            assert all(
                re.fullmatch(r'<script src="/admin/static/htmx.min.js\?[^"]+" defer></script>', s) for s in scripts
            )

    def test_errors_are_pages(self, admin: Browser) -> None:
        for url in ("/admin/nothing", f"/admin/edits/{UUID}", "/admin/models/nothing/checkpoints"):
            answer = admin.get(url)
            assert (answer.status_code, answer.headers["Content-Type"]) == (404, "text/html; charset=utf-8"), url
            assert "<h1>" in answer.text
        assert admin.get("/admin/edits/1").status_code == 422
        assert admin.get("/admin/audit?since=yesterday").status_code == 422
        assert admin.get("/v1/nothing").headers["Content-Type"] == "application/problem+json"

    def test_our_own_errors_are_pages(self, reader: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("a secret")

        monkeypatch.setattr("app.models.service.list_models", fail)
        answer = reader.get("/admin/")
        assert (answer.status_code, answer.headers["Content-Type"]) == (500, "text/html; charset=utf-8")
        assert "a secret" not in answer.text

    def test_the_style_needs_no_session(self, browser: Browser) -> None:
        answer = browser.get("/admin/static/style.css")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/css; charset=utf-8")
        for path in ("../routes.py", "%2e%2e/routes.py", "..%2froutes.py"):
            assert browser.get(f"/admin/static/{path}", follow_redirects=False).status_code != 200

    def test_the_root_leads_to_the_overview(self, reader: Browser) -> None:
        assert reader.get("/admin").url.path == "/admin/"
