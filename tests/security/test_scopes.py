"""Row 19: every scope on every route. The table is the OpenAPI document's own; a route that declares none fails."""

import re
from collections.abc import Mapping

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from app.auth.service import SCOPES
from tests.app.conftest import Headers

OPEN = {"/healthz", "/metrics", "/readyz"}
ANY_KEY = {"/api/whoami-v2"}
UUID = "00000000-0000-7000-8000-000000000000"
PLACES = {
    "revision": "v1", "version": "v1", "image_id": "sha256:" + "0" * 64, "sha256": "0" * 64, "path": "config.json",
    "alias": "production",
}  # fmt: skip


def table(built: FastAPI) -> list[tuple[str, str, list[str] | None]]:
    """(method, path, declared scopes); None where a call needs no key."""
    found = []
    for path, methods in built.openapi()["paths"].items():
        for method, operation in methods.items():
            security = operation.get("security")
            found.append((method, path, security[0]["HTTPBearer"] if security else None))
    return found


def url(path: str) -> str:
    def place(match: re.Match[str]) -> str:
        name = match[1]
        return PLACES.get(name, UUID if name.endswith("_id") else "nobody")

    return re.sub(r"\{(\w+?)(?::path)?\}", place, path)


def test_every_route_is_documented_or_public(built: FastAPI) -> None:
    """What is not in the document is in no table below: the pages of the document, and the admin pages, whose scopes
    tests/app/admin/test_access.py tests."""
    documented = {path for _, path, _ in table(built)}
    routed = {(route.path or "").replace(":path}", "}") for route in iter_route_contexts(built.routes)}
    assert len(routed) > 50
    assert routed - documented == {"/openapi.json", "/docs", "/redoc", "/static-offline-docs", "/admin"}


def test_every_route_declares_its_scope(built: FastAPI) -> None:
    for method, path, scopes in table(built):
        if scopes is None:
            assert path in OPEN, f"{method} {path} needs no key; if it is to be open, say so here"
        elif path in ANY_KEY:
            assert scopes == []
        else:
            assert len(scopes) == 1 and scopes[0] in SCOPES, f"{method} {path} declares {scopes}"


def test_no_changing_route_accepts_the_scope_read(built: FastAPI) -> None:
    for method, path, scopes in table(built):
        if method != "get" and not path.endswith("/paths-info/{revision}"):
            assert scopes != ["read"], (method, path)


@pytest.mark.parametrize("key", ["none", "malformed", "unknown", *SCOPES])
def test_each_route_accepts_only_keys_with_its_scope(
    client: TestClient, keys: Mapping[str, Headers], built: FastAPI, key: str
) -> None:
    headers = {
        **keys,
        "none": {},
        "malformed": {"Authorization": "Basic YTpi"},
        "unknown": {"Authorization": "Bearer em_000000000000_" + "x" * 43},
    }[key]
    client.app.state.rate_limits.failed_auth = None  # type: ignore[attr-defined]
    for method, path, scopes in table(built):
        answer = client.request(method, url(path), headers=headers, follow_redirects=False)
        if scopes is None:
            expected = answer.status_code == 200
        elif key not in SCOPES:
            expected = answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        elif key == "admin" or not scopes or key in scopes:
            expected = answer.status_code not in (401, 403) and answer.status_code < 500
        else:
            expected = answer.status_code == 403
        assert expected, (method, path, key, scopes, answer.status_code, answer.text)
