"""What is done to a version by its page."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Checkpoint, Evaluation, Model
from tests.app.admin.conftest import Browser
from tests.app.admin.test_routes import HOSTILE, URL, loaded, version
from tests.app.checkpoints.conftest import add_edit, statistics

__all__ = ["add_edit", "statistics", "version"]

V1 = f"{URL}/v1"


@pytest.fixture
def applier(signed_in_with: Callable[..., Browser]) -> Browser:
    return signed_in_with("read", "apply")


def newest(session: Session) -> Any:
    return session.scalars(select(AuditEvent).order_by(AuditEvent.sequence.desc())).first()


def test_its_pictures_are_on_its_page(reader: Browser, version: Any, session: Session) -> None:
    evaluation = session.scalars(select(Evaluation)).one()
    assert f'<img src="{V1}/evaluations/{evaluation.id}/files/grid.png"' in loaded(reader, V1)


def test_retract(admin: Browser, version: Any, session: Session) -> None:
    page = loaded(admin, f"{V1}/retract")
    assert "<strong>production</strong> points at it" in page
    refused = admin.submit(f"{V1}/retract", f"{V1}/retract", **{"/reason": " "})
    assert refused.status_code == 422 and 'aria-invalid="true"' in refused.text
    assert admin.submit(f"{V1}/retract", f"{V1}/retract", **{"/reason": HOSTILE}).headers["Location"] == V1
    assert session.scalars(select(Checkpoint.state)).one() == "retracted"
    assert (newest(session).action, newest(session).reason) == ("checkpoint.retract", HOSTILE)
    assert "&lt;script&gt;" in loaded(admin, V1)
    again = admin.submit(f"{V1}/retract", f"{V1}/retract", **{"/reason": "again"})
    assert again.status_code == 410


def test_pictures_are_asked_for(applier: Browser, version: Any, session: Session) -> None:
    form = f"{V1}/evaluations/new?kind=preview"
    fields = {
        "/prompts": "a cat\na dog",
        "/controls": "",
        "/seeds": "1 2",
        "/num_inference_steps": "5",
        "/guidance_scale": "",
    }
    answer = applier.submit(form, f"{V1}/evaluations?kind=preview", **fields)
    assert answer.status_code == 303, answer.text
    asked = session.scalars(select(Evaluation).order_by(Evaluation.id.desc()).limit(1)).one().request
    assert (asked["prompts"], asked["seeds"], asked["num_inference_steps"]) == (["a cat", "a dog"], [1, 2], 5)
    assert newest(session).action == "evaluation.preview"
    page = loaded(applier, answer.headers["Location"])
    assert "?seen=queued" in page
    (cancel,) = re.findall(r'action="([^"]+/cancel)"', page)
    assert applier.submit(answer.headers["Location"], cancel).status_code == 303
    assert newest(session).action == "evaluation.cancel"
    wrong = applier.submit(form, f"{V1}/evaluations?kind=preview", **fields | {"/seeds": "one", "/prompts": HOSTILE})
    assert wrong.status_code == 422
    assert re.search(r'id="/seeds"[^>]* aria-invalid', wrong.text) and "&lt;script&gt;" in wrong.text


def test_a_measurement_needs_a_classifier(applier: Browser, version: Any, model: Model, session: Session) -> None:
    form = f"{V1}/evaluations/new?kind=evaluation"
    asked = {"/scales": "1", "/held_out": "", "/seed": "", "/num_inference_steps": "", "/guidance_scale": ""}
    assert applier.submit(form, f"{V1}/evaluations?kind=evaluation", **asked).status_code == 409
    model.classifier = "emoji"
    session.commit()
    assert applier.submit(form, f"{V1}/evaluations?kind=evaluation", **asked).status_code == 303
    assert session.scalars(select(Evaluation).order_by(Evaluation.id.desc()).limit(1)).one().request["scales"] == [1]
