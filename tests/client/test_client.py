"""Every operation of the API through the sync and the async client, against the application itself."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from emender import ApiError, Client, Conflict, EditCreate, Forbidden, License, NotFound
from emender.pictures import Picture
from emender.schemas.common import WorkStatus
from tests.client.conftest import Wire
from tests.seeded import WEBHOOK, WEIGHTS, Seeded

EDIT: dict[str, Any] = {"source": "dog", "destination": "cat"}
BATCH_EDIT = {"source": "dog", "destination": {"prompt": "cat"}}


@pytest.fixture
def calls(seeded: Seeded, tmp_path: Path) -> list[Callable[[Client], Any]]:
    """One call per method; those that end something come last."""
    names = seeded.parameters
    edit, queued, failed = (str(seeded.edits[state].id) for state in ("ready", "queued", "failed"))
    evaluation, webhook = names["evaluation_id"], names["webhook_id"]
    picture = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    return [
        lambda c: c.models.register("other", source="google/other", license=License(id="mit")),
        lambda c: c.models.list(),
        lambda c: c.models.get("emoji"),
        lambda c: c.models.events("emoji"),
        lambda c: c.models.wait("emoji"),
        lambda c: expect_error(lambda: c.models.delete("emoji"), 409),
        lambda c: c.statistics.list("emoji"),
        lambda c: c.statistics.get("emoji", names["statistics_id"]),
        lambda c: c.statistics.events("emoji", names["statistics_id"]),
        lambda c: c.statistics.wait("emoji", names["statistics_id"]),
        lambda c: c.statistics.create("emoji", captions=["a fox"]),
        lambda c: c.images.upload(picture),
        lambda c: c.images.upload(picture.read_bytes()),
        lambda c: c.images.get(names["image_id"]),
        lambda c: c.images.upload(Image.new("RGB", (8, 8), "red")),
        lambda c: c.images.picture(names["image_id"]),
        lambda c: c.edits.create("emoji", **EDIT),
        lambda c: c.edits.create_batch("emoji", [BATCH_EDIT, EditCreate.model_validate(BATCH_EDIT)]),
        lambda c: c.edits.list(model="emoji", state="ready"),
        lambda c: c.edits.get(edit),
        lambda c: c.edits.events(edit),
        lambda c: c.edits.wait(edit),
        lambda c: c.edits.pictures(edit),
        lambda c: c.edits.value(edit),
        lambda c: c.edits.cancel(queued),
        lambda c: c.edits.retry(failed),
        lambda c: c.checkpoints.apply("emoji", edits=[edit], notes="test"),
        lambda c: c.checkpoints.plan("emoji", edits="ready"),
        lambda c: c.checkpoints.list("emoji"),
        lambda c: c.checkpoints.get("emoji", "v1"),
        lambda c: c.checkpoints.events("emoji", "v1"),
        lambda c: c.checkpoints.wait("emoji", "production"),
        lambda c: c.checkpoints.difference("emoji", "v1", against="v2"),
        lambda c: c.checkpoints.download("emoji", "v1", WEIGHTS, tmp_path / "weights"),
        lambda c: c.aliases.list("emoji"),
        lambda c: c.aliases.get("emoji", "production"),
        lambda c: c.aliases.history("emoji", "production", at=datetime.now(UTC)),
        lambda c: c.aliases.move("emoji", "production", "v2", expected=c.aliases.get("emoji", "production")),
        lambda c: c.aliases.delete("emoji", "production", expected=c.aliases.get("emoji", "production")),
        lambda c: c.evaluations.create_preview("emoji", "v1", prompts=["a fox"], seeds=[1]),
        lambda c: c.evaluations.create("emoji", "v1", seed=1),
        lambda c: c.evaluations.list("emoji", "v1", kind="preview"),
        lambda c: c.evaluations.get("emoji", "v1", evaluation),
        lambda c: c.evaluations.cancel("emoji", "v1", evaluation),
        lambda c: c.evaluations.events("emoji", "v1", evaluation),
        lambda c: expect_error(lambda: c.evaluations.download("emoji", "v1", evaluation, "a.png", tmp_path / "a"), 404),
        lambda c: c.files.trace(names["sha256"]),
        lambda c: c.signing_keys.list(),
        lambda c: expect_error(c.signing_keys.current, 404),
        lambda c: c.audit.list(action="edit.create"),
        lambda c: c.audit.export("csv", actor="test"),
        lambda c: c.audit.verify(),
        lambda c: c.keys.create("deploy", scopes=["read"]),
        lambda c: c.keys.list(),
        lambda c: c.keys.revoke(names["key_id"]),
        lambda c: c.webhooks.create(WEBHOOK["url"], events=WEBHOOK["events"]),
        lambda c: c.webhooks.list(),
        lambda c: c.webhooks.get(webhook),
        lambda c: c.webhooks.update(webhook, description="deployments"),
        lambda c: c.webhooks.rotate(webhook),
        lambda c: c.webhooks.test(webhook),
        lambda c: c.webhooks.deliveries(webhook),
        lambda c: c.webhooks.delivery(webhook, names["delivery_id"]),
        lambda c: c.webhooks.redeliver(webhook, names["delivery_id"]),
        lambda c: c.webhooks.delete(webhook),
        lambda c: c.checkpoints.retract("emoji", "v1", reason="draws the wrong flag"),
    ]


def expect_error(call: Callable[[], Any], status: int) -> None:
    with pytest.raises(ApiError) as error:
        call()
    assert error.value.status == status


def test_every_operation_is_called_and_typed(
    built: FastAPI, emender: Callable[..., Client], wire: Wire, calls: list[Callable[[Client], Any]]
) -> None:
    """Together the calls send every operation of the OpenAPI document."""
    client = emender()
    for call in calls:
        found = call(client)
        if hasattr(found, "__next__"):
            found = list(found)
            assert found, "an empty list tests nothing"
        for item in found if isinstance(found, list | tuple) else [found]:
            assert isinstance(item, BaseModel | Picture | bytes | str | Path | None)
    templates = {
        f"{method} {path}": re.compile(re.sub(r"\{(\w+)\}", lambda m: ".+" if m[1] == "path" else "[^/]+", path))
        for path, methods in built.openapi()["paths"].items()
        for method in methods
        if path.startswith("/v1/")
    }
    sent = set()
    for request in wire.sent:
        matching = [
            operation
            for operation, template in templates.items()
            if operation.startswith(request.method.lower() + " ") and template.fullmatch(request.url.path)
        ]
        sent.add(min(matching, key=lambda operation: operation.count("{")))
    assert templates.keys() - sent == set()


def test_responses_have_what_was_sent(emender: Callable[..., Client], seeded: Seeded, tmp_path: Path) -> None:
    client = emender()
    made = client.edits.create("emoji", **EDIT, reason="LEGAL-7")
    assert (made.source, made.destination, made.reason, made.state) == ("dog", {"prompt": "cat"}, "LEGAL-7", "queued")
    assert {edit.state for edit in client.edits.list(state="ready")} == {"ready"}
    (plan,) = client.checkpoints.plan("emoji", edits="ready").edits
    assert plan.id == seeded.edits["ready"].id
    assert client.checkpoints.apply("emoji", from_="v1", notes="the same").parent == "v1"
    weights = client.checkpoints.download("emoji", "v1", WEIGHTS, tmp_path / "a" / "weights")
    assert weights.read_bytes() == bytes(range(256)) * 10
    assert [path.name for path in weights.parent.iterdir()] == ["weights"]
    assert [json.loads(line)["action"] for line in client.audit.export(action="edit.create")] == ["edit.create"]
    (status,) = client.edits.events(seeded.edits["ready"].id)
    assert status == WorkStatus(id=seeded.edits["ready"].id, state="ready", attempt=0, progress=None, problem=None)


def test_pages_are_requested_when_needed(emender: Callable[..., Client], seeded: Seeded, wire: Wire) -> None:
    client = emender()
    client.edits.create_batch("emoji", [{**BATCH_EDIT, "source": f"dog {n}"} for n in range(401)])
    wire.sent.clear()
    edits = client.edits.list(model="emoji", state="queued")
    assert next(edits).source == "dog 400"
    assert len(wire.sent) == 1
    assert len({edit.id for edit in edits}) == 401
    assert len(wire.sent) == 3


class TestAliases:
    def test_move_requires_the_expected_state(self, emender: Callable[..., Client], seeded: Seeded) -> None:
        client = emender()
        seen = client.aliases.get("emoji", "production")
        moved = client.aliases.move("emoji", "production", "v2", expected=seen)
        assert (moved.version, moved.etag != seen.etag) == ("v2", True)
        for late in (seen, None):
            with pytest.raises(Conflict) as error:
                client.aliases.move("emoji", "production", "v1", expected=late)
            assert error.value.status == 412 and "Read it again" in str(error.value)
        assert client.aliases.move("emoji", "staging", "v1", expected=None).version == "v1"

    def test_lost_response_is_no_conflict(self, emender: Callable[..., Client], seeded: Seeded, wire: Wire) -> None:
        client = emender()
        wire.drop = True
        moved = client.aliases.move("emoji", "production", "v2", expected=client.aliases.get("emoji", "production"))
        assert moved.version == "v2"
        wire.drop = True
        client.aliases.delete("emoji", "production", expected=moved)
        assert client.aliases.list("emoji") == []


def test_post_with_a_lost_response_is_done_once(emender: Callable[..., Client], seeded: Seeded, wire: Wire) -> None:
    client = emender("edit")
    wire.drop = True
    made = client.edits.create("emoji", **EDIT)
    assert len(wire.sent) == 2
    assert len({request.headers["Idempotency-Key"] for request in wire.sent}) == 1
    assert [edit.id for edit in emender("read").edits.list(source="dog")] == [made.id]


def test_missing_scope_is_forbidden(emender: Callable[..., Client], seeded: Seeded) -> None:
    with pytest.raises(Forbidden) as error:
        emender("read").edits.create("emoji", **EDIT)
    assert error.value.status == 403
    assert "emender keys create" in (error.value.next_step or "")
    assert error.value.request_id


def test_names_are_quoted_in_paths(emender: Callable[..., Client], seeded: Seeded, wire: Wire) -> None:
    client = emender()
    with pytest.raises(NotFound, match="404"):
        client.models.get("../keys")
    assert wire.sent[-1].url.raw_path == b"/v1/models/..%2Fkeys"
    for name in ("", ".", ".."):
        with pytest.raises(Exception, match="is not a name"):
            client.models.get(name)
