"""Each error is answered as a problem document."""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from jsonschema import validate
from sqlalchemy.exc import OperationalError

from app.problems import Conflict, NotFound, Unprocessable, documented, pointer
from app.settings import Settings
from app.storage.store import BlobCorrupt
from emender.schemas.common import ProblemDocument
from tests.app.conftest import Headers

pytestmark = pytest.mark.security

HEADERS = {"Content-Type": "application/json"}


def problem(answer: Any, status: Any) -> Any:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    document = answer.json()
    validate(document, ProblemDocument.model_json_schema())
    assert document["status"] == status
    assert document["detail"]
    assert document["instance"] == answer.request.url.path
    return document


class TestFramework:
    def test_unknown_path(self, client: TestClient) -> None:
        document = problem(client.get("/v1/nothing"), 404)
        assert document["title"] == "Not found"

    def test_other_method(self, client: TestClient) -> None:
        answer = client.put("/v1/keys")
        problem(answer, 405)
        assert "POST" in answer.headers["Allow"]

    def test_unauthorized(self, client: TestClient) -> None:
        problem(client.get("/v1/keys"), 401)

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"",
            b"[" * 100_000,
            b'{"name": "a", "name": "b", "scopes": ["read"]}',
            b'{"name": "a", "scopes": ["read"], "x": NaN}',
            b'{"name": "a", "scopes": ["read"], "x": 1e999}',
            b'{"name": "\xff", "scopes": ["read"]}',
            b"null",
            b"[]",
            b'"text"',
        ],
    )
    def test_bad_json(self, client: TestClient, keys: Mapping[str, Headers], body: Any) -> None:
        answer = client.post("/v1/keys", headers=keys["admin"] | HEADERS, content=body)
        problem(answer, 400 if answer.status_code == 400 else 422)

    def test_malformed_json_says_why(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        body = b'{"name": "a", "name": "b"}'
        document = problem(client.post("/v1/keys", headers=keys["admin"] | HEADERS, content=body), 400)
        assert "'name' is given twice" in document["detail"]
        assert document["title"] == "Malformed body"

    def test_other_media_type(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        answer = client.post("/v1/keys", headers=keys["admin"] | {"Content-Type": "text/plain"}, content=b"{}")
        problem(answer, 422)


class TestBodyLimit:
    def test_declared(self, client: TestClient, keys: Mapping[str, Headers], settings: Settings) -> None:
        body = b" " * (settings.max_body_bytes + 1)
        for url in ("/v1/keys", "/v1/images", "/v1/models/emoji/edits/batch"):
            answer = client.post(url, headers=keys["admin"] | HEADERS, content=body)
            problem(answer, 413)
        problem(client.post("/v1/nothing", headers=HEADERS, content=body), 404)

    def test_undeclared(self, client: TestClient, keys: Mapping[str, Headers], settings: Settings) -> None:
        def chunks() -> Iterator[Any]:
            for _ in range(settings.max_body_bytes // 2**20 + 2):
                yield b" " * 2**20

        for kind in ("application/json", "multipart/form-data; boundary=x"):
            url = "/v1/images" if kind.startswith("multipart") else "/v1/keys"
            answer = client.post(url, headers=keys["admin"] | {"Content-Type": kind}, content=chunks())
            problem(answer, 413)


class TestErrors:
    """Raised while a request is answered."""

    @pytest.fixture
    def failing(
        self, client: TestClient, keys: Mapping[str, Headers], monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[Exception], Response]:
        def answer(error: Any) -> Any:
            def fail(*_: Any, **__: Any) -> None:
                raise error

            monkeypatch.setattr("app.models.service.list_models", fail)
            return client.get("/v1/models", headers=keys["read"])

        return answer

    def test_database_gone(self, failing: Callable[[Exception], Response]) -> None:
        answer = failing(OperationalError("SELECT secret", {}, Exception("connection refused")))
        document = problem(answer, 503)
        assert answer.headers["Retry-After"]
        assert "secret" not in json.dumps(document)

    def test_disk_full(self, failing: Callable[[Exception], Response]) -> None:
        problem(failing(OSError(errno.ENOSPC, "No space left on device")), 507)

    def test_damaged_blob(self, failing: Callable[[Exception], Response]) -> None:
        problem(failing(BlobCorrupt("0" * 64)), 500)

    def test_anything_else(self, failing: Callable[[Exception], Response]) -> None:
        for error in (RuntimeError("a secret"), OSError(errno.EACCES, "a secret")):
            assert "a secret" not in problem(failing(error), 500)["detail"]

    def test_half_a_surrogate_pair(self, failing: Callable[[Exception], Response]) -> None:
        document = problem(failing(Unprocessable.at("/labels/\ud800", "no \udfff")), 422)
        assert document["errors"][0]["pointer"] == "/labels/\ud800"


class TestPointer:
    def test_body(self) -> None:
        assert pointer(("body", "templates", 1)) == "/templates/1"
        assert pointer(("body", "labels", "a/b~c")) == "/labels/a~1b~0c"
        assert pointer(("body",)) == ""

    def test_parameter(self) -> None:
        assert pointer(("query", "limit")) == "limit"


def test_documented() -> None:
    class Other(NotFound):
        title = "Other not found"

    responses = documented(NotFound, Conflict, Other)
    assert {status: response["description"] for status, response in responses.items()} == {
        404: "Not found, Other not found",
        409: "Conflict",
    }
