"""The application of tests/app, one of everything in its database, and a client of it by the scope of its key."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy.orm import Session

from app.settings import Settings
from app.storage.local import LocalStore
from emender import Client
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


class Wire(httpx2.BaseTransport):
    """Hands requests on, and notes them; of those whose answers are to be dropped, the answer is dropped once."""

    def __init__(self, upstream: httpx2.BaseTransport) -> None:
        self.upstream = upstream
        self.sent: list[httpx2.Request] = []
        self.drop = False

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request)
        answer = self.upstream.handle_request(request)
        if self.drop:
            self.drop = False
            raise httpx2.ReadError("the connection broke before the answer", request=request)
        return answer


@pytest.fixture
def wire(client: TestClient) -> Wire:
    return Wire(client._transport)


@pytest.fixture
def emender(
    wire: Wire, keys: Mapping[str, Headers], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Client]]:
    """A client with the key of a scope; it does not pause."""
    monkeypatch.setattr("emender.connection.time.sleep", lambda _: None)
    with ExitStack() as stack:

        def make(scope: str = "admin") -> Client:
            token = keys[scope]["Authorization"].removeprefix("Bearer ")
            return stack.enter_context(Client("http://testserver", api_key=token, transport=wire))

        yield make
