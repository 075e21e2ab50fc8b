"""The middleware alone, with clients that take their time."""

from collections.abc import AsyncIterator

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app import problems
from app.api.middleware.body_limit import SMALL, BodyLimit

pytestmark = pytest.mark.security


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def limited(*, patience: float = 60.0, rate: int = 1000) -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", length, methods=["POST"])])
    problems.install(app)  # type: ignore[arg-type]
    app.add_middleware(BodyLimit, max_bytes=3 * SMALL, patience=patience, rate=rate, large=["/large/[^/]+"])
    return TestClient(app)


@pytest.mark.parametrize(("path", "most"), [("/small", SMALL), ("/large/a", 3 * SMALL), ("/large/a/b", SMALL)])
def test_each_path_has_its_limit(path: str, most: int) -> None:
    with limited() as client:
        assert client.post(path, content=b"x" * most).text == str(most)
        refused = client.post(path, content=b"x" * (most + 1))
        assert refused.status_code == 413
        assert str(most) in refused.json()["detail"]
        assert client.post(path, content=iter([b"x" * most, b"x"])).status_code == 413


async def send(app: TestClient, *chunks: tuple[float, bytes]) -> tuple[int, list[dict[str, object]]]:
    """Each chunk after its pause; then nothing for ever. Returns how many were taken, and what was answered."""
    sent: list[dict[str, object]] = []
    taken = 0

    async def messages() -> AsyncIterator[dict[str, object]]:
        for pause, body in chunks:
            nonlocal taken
            await anyio.sleep(pause)
            taken += 1
            yield {"type": "http.request", "body": body, "more_body": True}
        await anyio.sleep_forever()

    arriving = messages()

    async def receive() -> dict[str, object]:
        return await anext(arriving)

    async def answer(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/small", "headers": [], "query_string": b"", "http_version": "1.1",
        "scheme": "http", "server": ("t", 80), "client": ("t", 1), "root_path": "",
    }  # fmt: skip
    with anyio.fail_after(30):
        await app.app(scope, receive, answer)  # type: ignore[arg-type]
    return taken, sent


@pytest.mark.parametrize(
    "chunks",
    [
        (),
        ((0, b"x"),),
        tuple((0.02, b"x") for _ in range(500)),  # a byte at a time never stalls, and is too slow all the same
    ],
)
def test_a_slow_body_is_not_waited_for(chunks: tuple[tuple[float, bytes], ...]) -> None:
    taken, (start, body) = anyio.run(lambda: send(limited(patience=0.3), *chunks))
    assert taken < 100
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]  # type: ignore[operator]
    assert b"too slowly" in body["body"]  # type: ignore[operator]


def test_one_that_keeps_coming_is() -> None:
    """For longer than the patience, at twenty times the rate; it is let go once it stops."""
    chunks = [(0.05, b"x" * 1000) for _ in range(20)]
    taken, (start, _) = anyio.run(lambda: send(limited(patience=0.3, rate=1000), *chunks))
    assert (taken, start["status"]) == (20, 408)
