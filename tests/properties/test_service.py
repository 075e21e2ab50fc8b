"""Edits, applies and aliases in any order, beside a plain model of what they are to be: dicts and lists."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import hypothesis
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy.orm import Session, sessionmaker

from app.api.rate_limit import RateLimits
from app.audit.service import verify
from app.db.models import Edit, Statistics
from app.storage.local import LocalStore
from tests.app.conftest import Headers, issue_keys, register
from tests.properties.conftest import CASES
from tests.seeded import build, end_job, finish

URL = "/v1/models/emoji"
NAMES = st.sampled_from(["production", "staging", "canary"])
SOURCES = st.sampled_from(["fox", "oak", "jug"])
PICK = st.integers(0, 10**6)


@dataclass
class Plain:
    """What the service is to say."""

    edits: dict[str, str] = field(default_factory=dict)  # id → state, oldest first
    sources: dict[str, str] = field(default_factory=dict)
    versions: list[tuple[str, set[str]]] = field(default_factory=list)  # state, edits; v1 first
    aliases: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    history: dict[str, list[int | None]] = field(default_factory=dict)
    events: int = 0

    def numbers(self, state: str) -> list[int]:
        return [number for number, (now, _) in enumerate(self.versions, start=1) if now == state]


class Machine(RuleBasedStateMachine):
    """Each run is in a transaction of its own that is rolled back."""

    engine: Any
    app: FastAPI
    store: LocalStore
    folder: Any

    def __init__(self) -> None:
        super().__init__()
        CASES["state machine, runs"] += 1
        self.connection = self.engine.connect()
        self.transaction = self.connection.begin()
        options: dict[str, Any] = {"expire_on_commit": False, "join_transaction_mode": "create_savepoint"}
        self.session = Session(self.connection, **options)
        self.app.state.sessions = sessionmaker(self.connection, **options)
        self.client = TestClient(self.app, raise_server_exceptions=False)
        self.client.__enter__()
        self.keys: Mapping[str, Headers] = issue_keys(self.session)
        model = register(self.session, self.store, folder=self.folder)
        columns = {"state": "ready", "captions_name": "t", "digest": "c" * 64, "created_by": "test"}
        self.session.add(Statistics(model_id=model.id, **columns))
        self.session.commit()
        self.plain = Plain(events=verify(self.session).events)

    def teardown(self) -> None:
        self.client.__exit__()
        self.session.close()
        self.transaction.rollback()
        self.connection.close()

    def ask(self, method: str, path: str, *, status: int, changes: bool = True, **given: Any) -> Any:
        CASES["state machine, steps"] += 1
        headers = self.keys["admin"] | given.pop("headers", {})
        answer = self.client.request(method, path, headers=headers, **given)
        assert answer.status_code == status, (method, path, given, answer.text)
        self.plain.events += bool(changes and status < 300)
        return answer

    def chosen(self, pick: int, *states: str) -> str | None:
        found = [edit_id for edit_id, state in self.plain.edits.items() if state in states]
        return found[pick % len(found)] if found else None

    @rule(source=SOURCES)
    def ask_for_an_edit(self, source: str) -> None:
        body = {"source": source, "destination": {"prompt": f"no {source}"}}
        made = self.ask("POST", f"{URL}/edits", status=202, json=body).json()
        self.plain.edits[made["id"]], self.plain.sources[made["id"]] = "queued", source

    @precondition(lambda self: self.chosen(0, "queued"))
    @rule(pick=PICK)
    def a_worker_finishes_an_edit(self, pick: int) -> None:
        edit_id = self.chosen(pick, "queued")
        assert edit_id is not None
        finish(self.session, UUID(edit_id))
        self.plain.edits[edit_id], self.plain.events = "ready", self.plain.events + 1

    @precondition(lambda self: self.chosen(0, "queued"))
    @rule(pick=PICK)
    def an_edit_fails(self, pick: int) -> None:
        edit_id = self.chosen(pick, "queued")
        assert edit_id is not None
        self.session.get_one(Edit, UUID(edit_id), populate_existing=True).state = "failed"
        end_job(self.session, UUID(edit_id))
        self.session.commit()
        self.plain.edits[edit_id] = "failed"

    @precondition(lambda self: self.plain.edits)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        edit_id = self.chosen(pick, "queued", "ready", "failed", "cancelled")
        assert edit_id is not None
        state = self.plain.edits[edit_id]
        ended = state in ("ready", "failed")
        self.ask("POST", f"/v1/edits/{edit_id}/cancel", status=409 if ended else 202, changes=state == "queued")
        self.plain.edits[edit_id] = state if ended else "cancelled"

    @precondition(lambda self: self.plain.edits)
    @rule(pick=PICK)
    def retry(self, pick: int) -> None:
        edit_id = self.chosen(pick, "queued", "ready", "failed", "cancelled")
        assert edit_id is not None
        retryable = self.plain.edits[edit_id] in ("failed", "cancelled")
        self.ask("POST", f"/v1/edits/{edit_id}/retry", status=202 if retryable else 409)
        self.plain.edits[edit_id] = "queued" if retryable else self.plain.edits[edit_id]

    @rule(alias=st.none() | NAMES)
    def apply_all_that_is_ready(self, alias: str | None) -> None:
        newest = {self.plain.sources[id]: id for id, state in self.plain.edits.items() if state == "ready"}
        body = {"edits": "ready"} | ({"alias": alias} if alias else {})
        answer = self.ask("POST", f"{URL}/apply", status=202 if newest else 422, json=body)
        if newest:
            self.plain.versions.append(("building", set(newest.values())))
            assert answer.json()["version"] == f"v{len(self.plain.versions)}"
            self.waiting = {**getattr(self, "waiting", {}), len(self.plain.versions): (alias, self.moves(alias))}

    def moves(self, alias: str | None) -> int:
        return len(self.plain.history.get(alias or "", []))

    @precondition(lambda self: self.plain.numbers("building"))
    @rule(pick=PICK)
    def a_worker_publishes(self, pick: int) -> None:
        found = self.plain.numbers("building")
        number = found[pick % len(found)]
        build(self.session, self.store, number=number)
        self.plain.versions[number - 1] = ("published", self.plain.versions[number - 1][1])
        self.plain.events += 1
        alias, moves = self.waiting[number]
        if alias is not None and moves == self.moves(alias):
            self.moved(alias, number)
            self.plain.events += 1

    def moved(self, alias: str, number: int | None) -> None:
        self.plain.history.setdefault(alias, []).append(number)
        if number is None:
            del self.plain.aliases[alias]
        else:
            self.plain.aliases[alias] = number

    @precondition(lambda self: self.plain.versions)
    @rule(name=NAMES, pick=PICK, stale=st.booleans())
    def move_an_alias(self, name: str, pick: int, stale: bool) -> None:
        number = pick % len(self.plain.versions) + 1
        state = self.plain.versions[number - 1][0]
        headers = {}
        if name in self.plain.aliases:
            headers["If-Match"] = '"0"' if stale else f'"{self.moves(name)}"'
        refused = {"building": 409, "published": 0, "retracted": 410}[state]
        if headers and stale:
            refused = 412
        created = name not in self.plain.aliases
        body = {"version": f"v{number}"}
        answer = self.ask(
            "PUT", f"{URL}/aliases/{name}", status=refused or (201 if created else 200), json=body, headers=headers
        )
        if not refused:
            self.moved(name, number)
            assert answer.headers["ETag"] == f'"{self.moves(name)}"'

    @rule(name=NAMES)
    def delete_an_alias(self, name: str) -> None:
        there = name in self.plain.aliases
        headers = {"If-Match": "*"} if there else {}
        self.ask("DELETE", f"{URL}/aliases/{name}", status=204 if there else 404, headers=headers)
        if there:
            self.moved(name, None)

    @precondition(lambda self: self.plain.numbers("published"))
    @rule(pick=PICK)
    def retract(self, pick: int) -> None:
        found = self.plain.numbers("published")
        number = found[pick % len(found)]
        self.ask("POST", f"{URL}/checkpoints/v{number}/retract", status=200, json={"reason": "wrong"})
        self.plain.versions[number - 1] = ("retracted", self.plain.versions[number - 1][1])

    @invariant()
    def the_service_says_the_same(self) -> None:
        items = self.ask("GET", "/v1/edits?limit=500", status=200, changes=False).json()["items"]
        assert {item["id"]: item["state"] for item in items} == self.plain.edits
        listed = self.ask("GET", f"{URL}/checkpoints?limit=500", status=200, changes=False).json()["items"]
        assert [item["state"] for item in reversed(listed)] == [state for state, _ in self.plain.versions]
        assert [item["edit_count"] for item in reversed(listed)] == [len(edits) for _, edits in self.plain.versions]
        aliases = self.ask("GET", f"{URL}/aliases", status=200, changes=False).json()
        assert {alias["name"]: int(alias["version"][1:]) for alias in aliases} == self.plain.aliases
        for name, numbers in self.plain.history.items():
            url = f"{URL}/aliases/{name}/history?limit=500"
            periods = self.ask("GET", url, status=200, changes=False).json()["items"]
            assert [period["version"] for period in reversed(periods)] == [
                number and f"v{number}" for number in numbers
            ]
            assert [period["until"] for period in periods] == [None, *(period["since"] for period in periods[:-1])]

    @invariant()
    def every_change_is_in_the_audit_log_once(self) -> None:
        found = verify(self.session)
        assert (found.valid, found.events) == (True, self.plain.events)

    @invariant()
    def what_is_served_is_what_was_published(self) -> None:
        for number, (state, edits) in enumerate(self.plain.versions, start=1):
            path = f"{URL}/checkpoints/v{number}"
            shown = self.ask("GET", path, status=200, changes=False).json()
            assert {edit["id"] for edit in shown["edits"]} == edits
            status = {"building": 409, "published": 200, "retracted": 410}[state]
            answer = self.ask("GET", f"{path}/files/text_encoder/model.safetensors", status=status, changes=False)
            if state == "published":
                assert answer.text == ",".join(sorted(edits))


@pytest.mark.slow
def test_the_service_behaves_like_the_reference_model(
    engine: Any, built: FastAPI, settings: Any, store: LocalStore, tmp_path: Any, examples: int
) -> None:
    built.state.settings, built.state.store = settings, store
    built.state.rate_limits = RateLimits(settings.model_copy(update={"rate_limit": "off"}))

    class Bound(Machine):
        pass

    Bound.engine, Bound.app, Bound.store, Bound.folder = engine, built, store, tmp_path / "tokenizer"
    run_state_machine_as_test(
        Bound,
        settings=hypothesis.settings(
            max_examples=2 * examples,
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=examples < 10,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
