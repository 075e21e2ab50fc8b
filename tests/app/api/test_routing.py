"""Routes alone, in an application without a database, with clients that take their time."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient

from app.api import routing
from app.api.problems import install_handlers
from app.api.routing import SMALL_BODY_BYTES, Route, accept_large_body
from tests.app.conftest import Headers

pytestmark = pytest.mark.security


def client_of(*, timeout: float = 60.0) -> TestClient:
    router = APIRouter(route_class=Route)

    @router.post("/small")
    async def small(request: Request) -> int:
        return len(await request.body())

    @router.post("/large")
    @accept_large_body
    async def large(request: Request) -> int:
        return len(await request.body())

    app = FastAPI()
    app.state.settings = SimpleNamespace(max_body_bytes=3 * SMALL_BODY_BYTES, body_timeout_seconds=timeout)
    app.include_router(router)
    install_handlers(app)
    return TestClient(app)


@pytest.mark.parametrize(("path", "limit"), [("/small", SMALL_BODY_BYTES), ("/large", 3 * SMALL_BODY_BYTES)])
def test_a_body_is_limited_by_its_endpoint(path: str, limit: int) -> None:
    with client_of() as client:
        assert client.post(path, content=b"x" * limit).json() == limit
        refused = client.post(path, content=b"x" * (limit + 1))
        assert refused.status_code == 413
        assert str(limit) in refused.json()["detail"]
        assert client.post(path, content=iter([b"x" * limit, b"x"])).status_code == 413


async def send(client: TestClient, *chunks: tuple[float, bytes]) -> tuple[int, list[dict[str, Any]]]:
    """Send each chunk after its pause, then nothing more. Return how many were read, and the response."""
    sent: list[dict[str, Any]] = []
    read = 0

    async def messages() -> AsyncIterator[dict[str, Any]]:
        nonlocal read
        for pause, body in chunks:
            await anyio.sleep(pause)
            read += 1
            yield {"type": "http.request", "body": body, "more_body": True}
        await anyio.sleep_forever()

    arriving = messages()

    async def receive() -> dict[str, Any]:
        return await anext(arriving)

    async def respond(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/small", "headers": [], "query_string": b"", "http_version": "1.1",
        "scheme": "http", "server": ("t", 80), "client": ("t", 1), "root_path": "",
    }  # fmt: skip
    with anyio.fail_after(30):
        await client.app(scope, receive, respond)  # type: ignore[arg-type]
    return read, sent


@pytest.mark.parametrize(
    "chunks",
    [(), ((0, b"x"),), tuple((0.02, b"x") for _ in range(500))],
    ids=["nothing", "one byte", "a byte at a time"],
)
def test_a_slow_body_gets_408(monkeypatch: pytest.MonkeyPatch, chunks: tuple[tuple[float, bytes], ...]) -> None:
    monkeypatch.setattr(routing, "MIN_BYTES_PER_SECOND", 1000)
    read, (start, body) = anyio.run(lambda: send(client_of(timeout=0.3), *chunks))
    assert read < 100
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert b"too slowly" in body["body"]


@pytest.mark.slow
def test_a_body_that_keeps_arriving_is_read_past_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets 408 once it stops."""
    monkeypatch.setattr(routing, "MIN_BYTES_PER_SECOND", 1000)
    chunks = [(0.05, b"x" * 1000) for _ in range(20)]
    read, (start, _) = anyio.run(lambda: send(client_of(timeout=0.3), *chunks))
    assert (read, start["status"]) == (20, 408)


def test_the_openapi_document_has_the_parameters_of_endpoints_and_not_those_of_the_route(
    client: TestClient, keys: dict[str, Headers]
) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/models/{model}/edits"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {"model", "Idempotency-Key"}
