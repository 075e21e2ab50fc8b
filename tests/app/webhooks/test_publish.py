"""A checkpoint that a worker process publishes at the request of an API process reaches the receiver."""

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook as Verifier

from app.local.supervisor import to_environment
from tests.app.checkpoints.conftest import Service, base_folder, service
from tests.app.hub.conftest import server
from tests.app.webhooks.conftest import Receiver
from tests.faults.conftest import WorkerProcess, wait

__all__ = ["base_folder", "server", "service"]


@pytest.fixture
def worker(service: Service, tmp_path: Path) -> Iterator[WorkerProcess]:
    settings = service.settings.model_copy(update={"poll_interval_seconds": 0.2})
    process = WorkerProcess(os.environ | to_environment(settings) | {"OMP_NUM_THREADS": "1"}, tmp_path / "worker.log")
    yield process
    process.end()


def signed(secret: str, headers: dict[str, str], body: bytes) -> str:
    """Sign by the specification, with the standard library."""
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), content, hashlib.sha256)
    return "v1," + base64.b64encode(digest).decode()


@pytest.mark.slow
def test_a_published_checkpoint_and_its_alias_reach_the_receiver(
    server: str, service: Service, worker: WorkerProcess, receiver: Receiver
) -> None:
    edit = service.edit("fox")

    def ask(method: str, path: str, scope: str, body: Any = None) -> Any:
        answer = httpx.request(method, f"{server}{path}", json=body, headers=service.keys[scope], timeout=60)
        assert answer.is_success, answer.text
        return answer.json()

    asked = {"url": receiver.url, "events": ["checkpoint.published", "alias.moved"]}
    secret = ask("POST", "/v1/webhooks", "admin", asked)["secret"]
    ask("POST", "/v1/models/tiny/apply", "apply", {"edits": [str(edit)], "alias": "production"})
    wait(lambda: receiver, lambda found: len(found.received) == 2 or worker.status is not None, timeout=240)
    assert worker.status is None, worker.log.read_text()[-2000:]
    events = {}
    for headers, body in receiver.received:
        event = json.loads(body)
        assert event == Verifier(secret).verify(body, headers)
        assert headers["webhook-signature"] == signed(secret, headers, body)
        events[event["type"]] = event["data"]
    version = ask("GET", "/v1/models/tiny/checkpoints/production", "read")
    path = "/v1/models/tiny/checkpoints/v1"
    assert events["checkpoint.published"] == {
        "model": "tiny",
        "version": "v1",
        "commit": version["commit"],
        "path": path,
    }
    moved = events["alias.moved"]
    assert (moved["model"], moved["alias"], moved["from"], moved["to"]) == ("tiny", "production", None, "v1")
