"""A database with one of everything that the API names, for tests that walk the whole OpenAPI document."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.audit.service import record
from app.auth import browser_sessions
from app.checkpoints.files import store_content
from app.checkpoints.publish import publish
from app.db.models import ApiKey, Checkpoint, Edit, Job, Model, Statistics
from app.jobs.enqueue import enqueue
from app.jobs.kinds import OPTIMIZE_EDIT
from app.storage.local import LocalStore
from tests.app.checkpoints.conftest import add_version, drawn_value, ready_edit
from tests.app.conftest import Headers, register

WEIGHTS = "text_encoder/model.safetensors"
WEBHOOK = {"url": "https://deploy.example/emender", "events": ["alias.moved", "checkpoint.published"]}


@dataclass(frozen=True)
class Seeded:
    """What there is, by the names of the OpenAPI document's path parameters, as it names them."""

    model: Model
    edits: Mapping[str, Edit]
    """By state: ready, queued, failed."""
    parameters: Mapping[str, str]


def seed(
    session: Session, client: TestClient, keys: Mapping[str, Headers], *, store: LocalStore, folder: Path
) -> Seeded:
    """Commits. The client's requests are of the same database."""
    model = register(session, store, folder=folder, classifier="none")
    statistics = Statistics(model_id=model.id, state="ready", captions_name="t", digest="c" * 64, created_by="test")
    session.add(statistics)
    session.commit()
    edits = {
        state: ready_edit(session, model, f"{state} fox", width=64, layer=2, state=state)
        for state in ("ready", "queued", "failed")
    }
    enqueue(session, kind=OPTIMIZE_EDIT, target_id=edits["queued"].id, actor="test")
    for state, ended in {"ready": "succeeded", "failed": "failed"}.items():
        session.add(Job(kind="optimize_edit", target_id=edits[state].id, state=ended))
    file = store_content(store, WEIGHTS, bytes(range(256)) * 10)
    for number in (1, 2):
        add_version(session, model, statistics, number, edits=[edits["ready"]], files=[file])

    def post(path: str, scope: str, status: int, **body: object) -> dict[str, str]:
        answer = client.post(path, headers=keys[scope] | {"Idempotency-Key": path}, **body)  # type: ignore[arg-type]
        assert answer.status_code == status, answer.text
        found: dict[str, str] = answer.json()
        return found

    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, format="PNG")
    image = post("/v1/images", "edit", 201, files={"file": ("a.png", picture.getvalue(), "image/png")})
    webhook = post("/v1/webhooks", "admin", 201, json=WEBHOOK)
    delivery = post(f"/v1/webhooks/{webhook['id']}/test", "admin", 202)
    evaluation = post("/v1/models/emoji/checkpoints/v1/previews", "apply", 202, json={"prompts": ["a fox"]})
    moved = client.put("/v1/models/emoji/aliases/production", headers=keys["apply"], json={"version": "v1"})
    assert moved.status_code == 201
    key = session.scalars(select(ApiKey).where(ApiKey.name == "test read")).one()
    browser_sessions.begin_session(session, key_id=key.id)
    session.commit()
    parameters = {
        "model": "emoji",
        "namespace": "emender",
        "repo": "emoji",
        "revision": "v1",
        "version": "v1",
        "alias": "production",
        "path": WEIGHTS,
        "folder": "text_encoder",
        "name": "before-after.png",
        "sha256": file.sha256,
        "image_id": image["id"],
        "edit_id": str(edits["ready"].id),
        "statistics_id": str(statistics.id),
        "webhook_id": webhook["id"],
        "delivery_id": delivery["id"],
        "evaluation_id": evaluation["id"],
        "key_id": str(key.id),
    }
    return Seeded(model=model, edits=edits, parameters=parameters)


def finish(session: Session, edit_id: UUID) -> None:
    """What a worker leaves of an edit."""
    edit = session.get_one(Edit, edit_id, populate_existing=True)
    end_job(session, edit_id)
    edit.state = "ready"
    edit.value = drawn_value(edit.source, width=64, layer=2)
    record(session, actor="worker", action="edit.ready", target=f"edit:{edit_id}", after={"state": "ready"})
    session.commit()


def build(session: Session, store: LocalStore, *, number: int) -> Checkpoint:
    """What a worker leaves of a version of the model `emoji`."""
    query = select(Checkpoint).join(Model, Checkpoint.model_id == Model.id)
    checkpoint = session.scalars(query.where(Model.name == "emoji", Checkpoint.number == number)).one()
    end_job(session, checkpoint.id)
    content = ",".join(sorted(str(edit.edit_id) for edit in checkpoint.edits)).encode()
    publish(session, checkpoint=checkpoint, files=[store_content(store, WEIGHTS, content)], report={})
    session.commit()
    return checkpoint


def end_job(session: Session, target_id: UUID) -> None:
    session.execute(update(Job).where(Job.target_id == target_id, Job.state == "queued").values(state="succeeded"))
