"""A real receiver on this machine, and a sender that may call it."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from app.db.engine import Sessions, sessions
from app.settings import Settings
from app.webhooks.sender import Sender
from app.webhooks.signing import WebhookKey

KEY = "k" * 40
LOOPBACK = (ip_network("127.0.0.0/8"),)


@dataclass
class Receiver:
    """Writes down what it is sent; answers with `statuses` in turn, then 204; hangs while `hanging` is set."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    location: str = ""
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if state.hanging.is_set():
                state.released.wait(30)
                return
            status = state.statuses.pop(0) if state.statuses else 204
            self.send_response(status)
            content = b"" if status == 204 else b"not now\0" + b"x" * 5000
            if state.location:
                self.send_header("Location", state.location)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    state.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhook_key": SecretStr(KEY), "webhook_networks": LOOPBACK})


@pytest.fixture
def factory(clean_database: Engine) -> Sessions:
    return sessions(clean_database)


@pytest.fixture
def sender(factory: Sessions) -> Callable[..., Sender]:
    def make(lease_seconds: float = 30.0) -> Sender:
        return Sender(factory, key=WebhookKey(KEY.encode()), networks=LOOPBACK, lease_seconds=lease_seconds)

    return make
