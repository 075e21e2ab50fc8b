"""The path of a POST of an edit, from the socket to the commit: which functions of ours run, and what they cost."""

import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, Engine, event

import app
import emender
from app.db.models import Model
from tests.app.conftest import Headers

OURS = tuple(str(Path(package.__file__ or "").parent) for package in (app, emender))
EDIT = {"source": "dog", "destination": {"prompt": "cat"}}


class Recorder:
    """Records the functions of ours that are called, until the first commit."""

    def __init__(self) -> None:
        self.active = False
        self.functions: set[str] = set()
        self.commits = 0
        self.statements: list[str] = []

    def on_call(self, frame: FrameType, kind: str, _: object) -> None:
        code = frame.f_code
        is_function = "<listcomp>" not in code.co_qualname and not code.co_name.startswith("<")
        if self.active and not self.commits and kind == "call" and is_function and code.co_filename.startswith(OURS):
            self.functions.add(f"{Path(code.co_filename).stem}.{code.co_qualname}")

    def on_commit(self, _: Connection) -> None:
        self.commits += self.active

    def on_statement(self, _: Connection, __: object, statement: str, *___: object) -> None:
        if self.active:
            self.statements.append(statement)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Must come before the application, so that its threads are profiled."""
    recorder = Recorder()
    listeners = (("commit", recorder.on_commit), ("before_cursor_execute", recorder.on_statement))
    for name, listener in listeners:
        event.listen(Engine, name, listener)
    threading.setprofile(recorder.on_call)
    yield recorder
    threading.setprofile(None)
    for name, listener in listeners:
        event.remove(Engine, name, listener)


@pytest.mark.parametrize("with_key", [True, False], ids=["with a key", "without a key"])
def test_a_post_takes_at_most_20_functions_and_one_commit(
    recorder: Recorder, live_client: TestClient, live_keys: Mapping[str, Headers], live_model: Model, with_key: bool
) -> None:
    for active in (False, True):  # the first request reads the tokenizer and sets the key's last use
        recorder.active = active
        key = {"Idempotency-Key": uuid.uuid4().hex} if with_key else {}
        response = live_client.post("/v1/models/emoji/edits", headers=live_keys["edit"] | key, json=EDIT)
        assert response.status_code == 202, response.text
    recorder.active = False
    assert recorder.commits == 1
    assert len(recorder.functions) <= 20, sorted(recorder.functions)
