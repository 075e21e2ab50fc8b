"""A real receiver on this machine, and a worker that may call it."""

import itertools
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from app.audit.events import subscribe
from app.db.engine import Sessions, sessions
from app.settings import Settings
from app.storage.local import LocalStore
from app.webhooks.subscriptions import EVENTS, enqueue_deliveries
from app.worker.claims import claim_delivery
from app.worker.runner import Runner
from tests.patience import patience

KEY = "k" * 40
LOOPBACK = (ip_network("127.0.0.0/8"),)


@dataclass
class Receiver:
    """Records what it is sent. Responds with `statuses` in order, then 204; hangs while `hanging` is set."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    location: str = ""
    retry_after: str = ""
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    hanging: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class QuietServer(ThreadingHTTPServer):
    """Ignores clients that close the connection, as they do when they refuse a certificate."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@contextmanager
def receiving(*, certificate: Path | None = None) -> Iterator[Receiver]:
    """Run a receiver; with TLS if given a certificate and its key (PEM)."""
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                self.respond()
            finally:
                state.at_once -= 1

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if state.hanging.is_set():
                state.released.wait(patience(30))
                return
            status = state.statuses.pop(0) if state.statuses else 204
            self.send_response(status)
            content = b"" if status == 204 else b"not now\0" + b"x" * 5000
            if state.location:
                self.send_header("Location", state.location)
            if state.retry_after:
                self.send_header("Retry-After", state.retry_after)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = QuietServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/hook"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        state.url = state.url.replace("http://127.0.0.1", "https://hooks.example")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    state.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhook_secret_key": SecretStr(KEY), "webhook_allowed_networks": LOOPBACK})


@pytest.fixture
def factory(clean_database: Engine) -> Sessions:
    return sessions(clean_database)


@pytest.fixture(autouse=True)
def subscribed() -> None:
    """As the API and the workers do when they start."""
    subscribe(enqueue_deliveries, actions=EVENTS)


@pytest.fixture
def deliverer(settings: Settings, factory: Sessions, store: LocalStore) -> Callable[..., Runner]:
    """Make a runner of deliveries, with changed settings."""

    def make(**changes: object) -> Runner:
        return Runner(
            settings=settings.model_copy(update=changes),
            sessions=factory,
            store=store,
            worker="w",
            stopping=threading.Event(),
            claim=claim_delivery,
        )

    return make


@pytest.fixture
def deliver(deliverer: Callable[..., Runner]) -> Callable[..., int]:
    """Send the deliveries that are due, with changed settings; returns how many."""

    def deliver(**changes: object) -> int:
        runner = deliverer(**changes)
        return next(count for count in itertools.count() if not runner.work())

    return deliver
