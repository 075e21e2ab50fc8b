import re
from collections.abc import Mapping
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.api.middleware.security_headers import SECURITY_HEADERS
from tests.app.conftest import Headers

pytestmark = pytest.mark.security


@pytest.mark.parametrize(
    ("path", "status"), [("/healthz", 200), ("/v1/keys", 401), ("/nothing", 404), ("/openapi.json", 200)]
)
def test_every_response_has_the_headers(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == value
    assert "Strict-Transport-Security" not in answer.headers


def test_an_unexpected_error_has_the_headers_and_the_request_s_id(
    client: TestClient, keys: Mapping[str, Headers], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("app.models.service.list_models", fail)
    answer = client.get("/v1/models", headers=keys["read"] | {"X-Request-ID": "r-1"})
    assert answer.status_code == 500
    assert answer.headers["Content-Security-Policy"] == SECURITY_HEADERS["Content-Security-Policy"]
    assert answer.headers["X-Request-ID"] == "r-1"


def test_https_responses_have_hsts(application: FastAPI) -> None:
    with TestClient(application, base_url="https://testserver") as client:
        assert client.get("/healthz").headers["Strict-Transport-Security"].startswith("max-age=")


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_documentation_pages_may_run_only_their_own_scripts(client: TestClient, page: str) -> None:
    answer = client.get(page)
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in policy["script-src"]
    inline = re.findall(r"<script>", answer.text)
    assert policy["script-src"].count("'sha256-") == len(inline)
    assert "onload=" not in answer.text
