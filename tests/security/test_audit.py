"""The audit log alone tells who did what, when and why, for each route."""

import random
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app.audit.service import verify
from app.db.models import AuditEvent, Model
from app.storage.local import LocalStore
from tests.app.conftest import Headers
from tests.app.images.test_routes import encoded
from tests.seeded import WEBHOOK, Seeded, build, finish, seed

EDIT = {"source": "dog", "destination": {"prompt": "cat"}, "reason": "LEGAL-42"}
BODIES: dict[str, dict[str, Any]] = {
    "post /v1/keys": {"json": {"name": "deploy", "scopes": ["read"]}},
    "delete /v1/keys/{key_id}": {},
    "post /v1/models": {"json": {"name": "other", "source": "google/other"}},
    "delete /v1/models/{model}": {"model": "broken"},
    "post /v1/models/{model}/statistics": {"json": {"captions": ["a fox"]}},
    "post /v1/images": {"files": {"file": ("a.png", encoded(color=(1, 2, 3)), "image/png")}},
    "post /v1/models/{model}/edits": {"json": EDIT},
    "post /v1/models/{model}/edits/batch": {"json": [EDIT, EDIT]},
    "post /v1/edits/{edit_id}/cancel": {"edit": "queued"},
    "post /v1/edits/{edit_id}/retry": {"edit": "failed"},
    "post /v1/models/{model}/apply": {"json": {"edits": "ready", "notes": "LEGAL-42"}},
    "post /v1/models/{model}/checkpoints/{version}/retract": {"json": {"reason": "the wrong flag"}},
    "post /v1/models/{model}/checkpoints/{revision}/previews": {"json": {"prompts": ["a fox"]}},
    "post /v1/models/{model}/checkpoints/{revision}/evaluations": {"json": {}},
    "post /v1/models/{model}/checkpoints/{revision}/evaluations/{evaluation_id}/cancel": {},
    "put /v1/models/{model}/aliases/{alias}": {
        "json": {"version": "v2", "reason": "better"},
        "headers": {"If-Match": "*"},
    },
    "delete /v1/models/{model}/aliases/{alias}": {"headers": {"If-Match": "*"}},
    "post /v1/webhooks": {"json": WEBHOOK},
    "patch /v1/webhooks/{webhook_id}": {"json": {"enabled": False}},
    "delete /v1/webhooks/{webhook_id}": {},
    "post /v1/webhooks/{webhook_id}/rotate": {},
    "post /v1/webhooks/{webhook_id}/test": {},
    "post /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver": {},
}
"""A request that succeeds for each operation that changes something."""
CHANGES_NOTHING = {"post /api/models/{namespace}/{repo}/paths-info/{revision}"}
"""Reads by POST, since its question may be long."""
NOTHING_BEFORE = ("create", "register", "add", "apply", "preview", "evaluation", "test", "redeliver", "batch")
ABOUT_NO_STATE = ("webhook.rotate", "webhook.test", "webhook.redeliver", "image.add", "edit.create_batch")
"""Their targets have nothing to show before and after but secrets, or are told by `details` whole."""


def operations(built: FastAPI) -> list[str]:
    paths = built.openapi()["paths"].items()
    return [f"{method} {path}" for path, methods in paths for method in methods if method != "get"]


def test_every_changing_operation_is_in_the_table(built: FastAPI) -> None:
    """A new one is to be added to the table, with a request that succeeds."""
    assert sorted(operations(built)) == sorted([*BODIES, *CHANGES_NOTHING])


@pytest.mark.parametrize("operation", BODIES)
def test_each_change_records_one_event(
    operation: str, client: TestClient, keys: Mapping[str, Headers], seeded: Seeded, session: Session
) -> None:
    def count() -> int:
        return session.scalars(select(func.count()).select_from(AuditEvent)).one()

    request = dict(BODIES[operation])
    parameters = dict(seeded.parameters)
    if (state := request.pop("edit", None)) is not None:
        parameters["edit_id"] = str(seeded.edits[state].id)
    if (name := request.pop("model", None)) is not None:
        session.add(
            Model(name=name, namespace="emender", source="google/other", state="failed", problem={}, created_by="test")
        )
        session.commit()
        parameters["model"] = name
    method, path = operation.split()
    url = re.sub(r"\{(\w+)(?::path)?\}", lambda match: parameters[match[1]], path)
    headers = keys["admin"] | request.pop("headers", {}) | {"X-Request-ID": "why-not"}
    before = count()
    answer = client.request(method, url, headers=headers, **request)
    assert answer.is_success, answer.text
    assert count() == before + 1
    event = session.scalars(select(AuditEvent).order_by(AuditEvent.sequence.desc()).limit(1)).one()
    admin = client.get("/api/whoami-v2", headers=keys["admin"]).json()["name"]
    assert (event.actor, event.request_id, event.address) == (admin, "why-not", "testclient")
    assert answer.headers["X-Request-ID"] == "why-not"
    if event.action not in ABOUT_NO_STATE:
        assert event.after is not None or event.action.endswith("delete")
        assert event.before is not None or event.action.endswith(NOTHING_BEFORE)
        assert event.before != event.after
    if "reason" in str(request) or "notes" in str(request):
        assert event.reason
    assert verify(session).valid


def test_a_hundred_parallel_changes_keep_the_chain_valid(
    live_client: TestClient, live_keys: Mapping[str, Headers], store: LocalStore, engine: Engine, tmp_path: Path
) -> None:
    """Edits, batches, keys, moves of one alias and applies, in a random order."""
    with Session(engine, expire_on_commit=False) as session:
        seed(session, live_client, live_keys, store=store, folder=tmp_path / "tokenizer")
        before = verify(session).events
    edits = "/v1/models/emoji/edits"
    alias = "/v1/models/emoji/aliases/production"
    requests: list[tuple[str, str, dict[str, Any]]] = []
    for number in range(20):
        requests += [
            ("post", edits, {"json": EDIT}),
            ("post", f"{edits}/batch", {"json": [EDIT, EDIT]}),
            ("post", "/v1/keys", {"json": {"name": f"deploy {number}", "scopes": ["read"]}}),
            ("put", alias, {"json": {"version": f"v{1 + number % 2}"}, "headers": {"If-Match": "*"}}),
            ("post", "/v1/models/emoji/apply", {"json": {"edits": "ready"}}),
        ]
    random.Random(0).shuffle(requests)

    def send(request: tuple[str, str, dict[str, Any]]) -> Response:
        method, url, options = request
        headers = live_keys["admin"] | options.get("headers", {})
        return live_client.request(method, url, **(options | {"headers": headers}))

    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(send, requests))
    assert [answer.text for answer in answers if not answer.is_success] == []
    with Session(engine) as session:
        found = verify(session)
        assert found.valid, found.reason
        recent = session.scalars(select(AuditEvent).where(AuditEvent.sequence > before).order_by(AuditEvent.sequence))
        events = recent.all()
    counts = Counter(event.action for event in events)
    assert found.events == before + len(events)
    for action in ("edit.create", "edit.create_batch", "key.create", "checkpoint.apply"):
        assert counts[action] == 20, counts
    moves = [(event.before, event.after) for event in events if event.action == "alias.move"]
    assert moves and all(after == then for (_, after), (then, _) in pairwise(moves))


def test_a_rejected_request_records_no_event(client: TestClient, keys: Mapping[str, Headers], session: Session) -> None:
    before = verify(session).events
    assert client.post("/v1/keys", headers=keys["admin"], json={"name": "a", "scopes": ["root"]}).status_code == 422
    assert client.post("/v1/keys", headers=keys["read"], json={"name": "a", "scopes": ["read"]}).status_code == 403
    assert verify(session).events == before


@pytest.mark.parametrize("batch", [False, True])
def test_the_log_names_who_put_a_concept_in_a_checkpoint(
    client: TestClient, keys: Mapping[str, Headers], seeded: Seeded, session: Session, store: LocalStore, batch: bool
) -> None:
    """From a version back to its author, time and reason, and on to its deployments on a day."""

    def name_of(scope: str) -> str:
        name: str = client.get("/api/whoami-v2", headers=keys[scope]).json()["name"]
        return name

    def read(path: str, **query: str) -> Any:
        answer = client.get(path, headers=keys["admin"], params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    asked: dict[str, Any] = {"source": "US president", "destination": {"prompt": "Joe Biden"}, "reason": "LEGAL-42"}
    url = "/v1/models/emoji/edits"
    if batch:
        made = client.post(f"{url}/batch", headers=keys["edit"], json=[asked]).json()["edits"][0]
    else:
        made = client.post(url, headers=keys["edit"], json=asked).json()
    finish(session, UUID(made["id"]))
    body = {"edits": [made["id"]], "notes": "release 7"}
    applied = client.post("/v1/models/emoji/apply", headers=keys["apply"], json=body).json()
    build(session, store, number=int(applied["version"][1:]))
    client.put(
        "/v1/models/emoji/aliases/production",
        headers=keys["apply"] | {"If-Match": "*"},
        json={"version": applied["version"], "reason": "release 7"},
    )

    (concept,) = read(f"/v1/models/emoji/checkpoints/{applied['version']}")["edits"]
    assert concept["source"] == "US president"
    told = {event["action"]: event for event in read("/v1/audit", edit=concept["id"])["items"]}
    created = told["edit.create_batch" if batch else "edit.create"]
    assert (created["actor"], created["reason"]) == (name_of("edit"), "LEGAL-42")
    assert told["checkpoint.apply"]["target"] == f"checkpoint:emoji/{applied['version']}"
    assert (told["checkpoint.apply"]["actor"], told["checkpoint.apply"]["reason"]) == (name_of("apply"), "release 7")

    now = told["checkpoint.apply"]["at"]
    history = "/v1/models/emoji/aliases/production/history"
    (today,) = read(history, limit="1")["items"]
    assert (today["version"], today["until"]) == (applied["version"], None)
    assert [period["version"] for period in read(history, at=now[:10])["items"]] == [applied["version"], "v1"]
    assert read(history, at="2020-01-01")["items"] == []
    assert [period["version"] for period in read(history, at=now)["items"]] == ["v1"]
    (move, *_) = read("/v1/audit", target="alias:emoji/production")["items"]
    assert (move["before"], move["after"], move["reason"]) == (
        {"version": "v1"}, {"version": applied["version"]}, "release 7",
    )  # fmt: skip
