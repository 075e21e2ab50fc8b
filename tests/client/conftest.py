"""Sync and async clients of the application in tests/app, with one of every resource in its database."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy.orm import Session

from app.settings import Settings
from app.storage.local import LocalStore
from emender import AsyncClient, Client
from tests.app.conftest import Headers, application, built, client, keys, plain_logs, store
from tests.seeded import Seeded, seed

__all__ = ["application", "built", "client", "keys", "plain_logs", "store"]


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(
        data_dir=tmp_path / "var", database_url=SecretStr(database_url), webhook_secret_key=SecretStr("k" * 40)
    )


@pytest.fixture
def seeded(
    session: Session, client: TestClient, keys: Mapping[str, Headers], store: LocalStore, tmp_path: Path
) -> Seeded:
    return seed(session, client, keys, store=store, folder=tmp_path / "tokenizer")


class Wire(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """A transport that records requests. With `drop` set, it drops the response of the next one."""

    def __init__(self, upstream: httpx2.BaseTransport) -> None:
        self.upstream = upstream
        self.sent: list[httpx2.Request] = []
        self.drop = False

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request)
        response = self.upstream.handle_request(request)
        if self.drop:
            self.drop = False
            raise httpx2.ReadError("the connection broke before the response", request=request)
        return response

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        response = self.handle_request(request)
        content = b"".join(cast(httpx2.SyncByteStream, response.stream))
        return httpx2.Response(response.status_code, headers=response.headers, stream=httpx2.ByteStream(content))


class Blocking:
    """An async client, called like the sync one, so that both pass the same tests."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if not callable(attribute):
            return Blocking(attribute, self._loop) if type(attribute).__module__.startswith("emender.") else attribute

        def call(*arguments: Any, **options: Any) -> Any:
            result = attribute(*arguments, **options)
            if inspect.isasyncgen(result):
                return self._iterate(result)
            return self._loop.run_until_complete(result)

        return call

    def _iterate(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def read_next() -> Any:
            return await anext(items, self)

        while (item := self._loop.run_until_complete(read_next())) is not self:
            yield item


@pytest.fixture(params=["sync", "async"])
def create_client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Client]]:
    """Create a client that takes the arguments of `Client`: the sync one, or the async one called like it."""
    with ExitStack() as stack:
        if request.param == "sync":
            yield lambda *arguments, **options: stack.enter_context(Client(*arguments, **options))
            return
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)

        def create(*arguments: Any, **options: Any) -> Client:
            created = AsyncClient(*arguments, **options)
            stack.callback(lambda: loop.run_until_complete(created.close()))
            return cast(Client, Blocking(created, loop))

        yield create


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a client would have slept."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("emender._sync.connection.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr("emender._async.connection.asyncio", SimpleNamespace(sleep=sleep))
    return slept


@pytest.fixture
def wire(client: TestClient) -> Wire:
    return Wire(client._transport)


@pytest.fixture
def emender(
    create_client: Callable[..., Client], wire: Wire, keys: Mapping[str, Headers], delays: list[float]
) -> Callable[..., Client]:
    """Create a client whose key has a scope. It does not sleep between attempts."""

    def create(scope: str = "admin") -> Client:
        token = keys[scope]["Authorization"].removeprefix("Bearer ")
        return create_client("http://testserver", api_key=token, transport=wire)

    return create
