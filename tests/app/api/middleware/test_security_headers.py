import re

import pytest
from fastapi.testclient import TestClient

from app.api.middleware.security_headers import ALWAYS

pytestmark = pytest.mark.security


@pytest.mark.parametrize(
    ("path", "status"), [("/healthz", 200), ("/v1/keys", 401), ("/nothing", 404), ("/openapi.json", 200)]
)
def test_every_answer_has_them(client, path, status):
    answer = client.get(path)
    assert answer.status_code == status
    for name, value in ALWAYS.items():
        assert answer.headers[name] == value
    assert "Strict-Transport-Security" not in answer.headers


def test_errors_of_our_own_making_have_them_and_the_request_s_id(client, keys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a secret")

    monkeypatch.setattr("app.models.service.list_models", fail)
    answer = client.get("/v1/models", headers=keys["read"] | {"X-Request-ID": "r-1"})
    assert answer.status_code == 500
    assert answer.headers["Content-Security-Policy"] == ALWAYS["Content-Security-Policy"]
    assert answer.headers["X-Request-ID"] == "r-1"


def test_https_is_to_be_kept_to(application):
    with TestClient(application, base_url="https://testserver") as client:
        assert client.get("/healthz").headers["Strict-Transport-Security"].startswith("max-age=")


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_pages_run_their_own_scripts_and_no_others(client, page):
    answer = client.get(page)
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in policy["script-src"]
    inline = re.findall(r"<script>", answer.text)
    assert policy["script-src"].count("'sha256-") == len(inline)
    assert "onload=" not in answer.text
