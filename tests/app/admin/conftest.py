"""Browsers: clients that keep the session's cookie and fill in forms. `client` is what starts the application."""

import html
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy.orm import Session

from app.auth.service import create_key
from tests.app.checkpoints.conftest import Service, base_folder, service
from tests.app.conftest import Headers

__all__ = ["base_folder", "service"]
FORM_TOKEN = re.compile(r'name="form_token" value="([0-9a-f]{64})"')


def hidden(page: str) -> dict[str, list[str]]:
    """What a page's forms hold in hidden fields."""
    fields: dict[str, list[str]] = {}
    for name, value in re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', page):
        fields.setdefault(name, []).append(html.unescape(value))
    return fields


class Browser(TestClient):
    """One that has no API key in its headers, and sends a form with what its page says."""

    def submit(self, page: str, action: str, *, files: Any = (), **fields: Any) -> Response:
        """Load `page`, and post its form to `action` with these fields."""
        found = FORM_TOKEN.search(self.get(page).text)
        assert found is not None, page
        return self.post(action, data={"form_token": found[1], **fields}, files=files or None, follow_redirects=False)

    def sign_in(self, headers: Headers, **fields: str) -> Response:
        token = headers["Authorization"].removeprefix("Bearer ")
        return self.submit("/admin/sign-in", "/admin/sign-in", key=token, **fields)


@pytest.fixture
def browser(application: FastAPI, client: TestClient) -> Browser:
    return Browser(application, raise_server_exceptions=False)


@pytest.fixture
def signed_in(application: FastAPI, client: TestClient, keys: Mapping[str, Headers]) -> Callable[[str], Browser]:
    """A browser whose session has the key of a scope."""

    def sign_in(scope: str) -> Browser:
        browser = Browser(application, raise_server_exceptions=False)
        assert browser.sign_in(keys[scope]).status_code == 303
        return browser

    return sign_in


@pytest.fixture
def signed_in_with(application: FastAPI, client: TestClient, session: Session) -> Callable[..., Browser]:
    """A browser whose session has a key of these scopes."""

    def sign_in(*scopes: str) -> Browser:
        _, token = create_key(session, name="test " + " and ".join(scopes), scopes=scopes, actor="test")
        session.commit()
        browser = Browser(application, raise_server_exceptions=False)
        assert browser.sign_in({"Authorization": f"Bearer {token}"}).status_code == 303
        return browser

    return sign_in


@pytest.fixture
def reader(signed_in: Callable[[str], Browser]) -> Browser:
    return signed_in("read")


@pytest.fixture
def admin(signed_in: Callable[[str], Browser]) -> Browser:
    return signed_in("admin")


@pytest.fixture
def browser_of() -> Callable[[Service], Browser]:
    """A reader's browser at a whole service."""

    def sign_in(service: Service) -> Browser:
        browser = Browser(service.client.app, raise_server_exceptions=False)
        assert browser.sign_in(service.keys["read"]).status_code == 303
        return browser

    return sign_in
