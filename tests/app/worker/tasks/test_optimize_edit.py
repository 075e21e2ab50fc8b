"""Stage I as a job, with the real method on a tiny pipeline."""

import hashlib
import io
from collections.abc import Callable, Sequence
from uuid import UUID

import pytest
from PIL import Image
from sqlalchemy import update

import editing
from app.db.engine import Sessions
from app.db.models import AuditEvent, Edit, Job, Model
from app.storage.local import LocalStore
from app.worker.edits import concept_edit
from app.worker.problems import INTERNAL
from app.worker.runner import Runner

AddEdits = Callable[..., list[UUID]]
ReadEdit = Callable[[UUID], Edit]

NOISE = {"objective": "noise", "optimization_steps": 2, "num_images": 2, "num_inference_steps": 2, "noise_pool_size": 4}


@pytest.fixture
def picture(store: LocalStore) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), "orange").save(buffer, "PNG")
    return "sha256:" + store.put(buffer.getvalue())


def test_each_kind_of_destination_is_optimized(
    runner: Runner,
    registered: Model,
    add_edits: AddEdits,
    edit: ReadEdit,
    picture: str,
    actions: Callable[[], list[str]],
) -> None:
    jobs = add_edits(
        registered,
        {"destination": {"prompt": "dog"}, "settings": NOISE | {"objective": "hybrid"}},
        {"destination": {"erase": True}},
        {"destination": {"erase": True, "neutral": "art"}},
        {"destination": {"balance": {"red": 0.5, "blue": 0.5}}},
        {"destination": {"images": [picture]}, "settings": NOISE},
    )
    assert runner.work()
    for job_id in jobs:
        row = edit(job_id)
        assert row.state == "ready" and row.problem is None
        assert row.value is not None and row.value.attempt == 1
        own = editing.EditValue.from_safetensors(row.value.content).encoders["text_encoder"]
        assert own.layer == 2 and own.delta.any() and len(own.delta) == len(own.hidden) == 32
    assert actions() == ["model.ready"] + ["edit.ready"] * 5


def test_the_value_equals_that_of_the_library(
    runner: Runner, registered: Model, add_edits: AddEdits, edit: ReadEdit, store: LocalStore
) -> None:
    """The stored value has the library's bytes for the same edit; the row has its losses and layers."""
    (job_id,) = add_edits(
        registered, {"source": "cat", "settings": {"objective": "text", "optimization_steps": 5, "seed": 3}}
    )
    runner.work()
    row = edit(job_id)
    pipeline = runner.context.pipelines.get(registered.id)
    (expected,) = editing.optimize_values(pipeline, [concept_edit(row, store=store)])
    assert isinstance(expected, editing.EditValue)
    value = row.value
    assert value is not None and value.content == expected.to_safetensors()
    assert value.sha256 == hashlib.sha256(value.content).hexdigest()
    assert value.losses["text"] == list(expected.text_losses) and len(value.losses["text"]) == 5
    assert value.engine == editing.ENGINE_VERSION
    own = expected.encoders["text_encoder"]
    norms = {"delta_norm": own.delta_norm, "hidden_norm": own.hidden_norm}
    assert value.encoders == [{"name": "text_encoder", "layer": own.layer, **norms}]


def test_an_invalid_edit_does_not_affect_its_batch(
    runner: Runner, registered: Model, add_edits: AddEdits, edit: ReadEdit, store: LocalStore, picture: str
) -> None:
    damaged = "sha256:" + store.put(b"bytes to be damaged")
    store.path(damaged.removeprefix("sha256:")).write_bytes(b"other bytes")
    fine, unknown, flipped, last = add_edits(
        registered,
        {},
        {"settings": {"from_the_future": 1}},
        {"destination": {"images": [picture, damaged]}, "settings": NOISE},
        {},
    )
    runner.work()
    assert edit(fine).state == edit(last).state == "ready"
    problems = {job_id: edit(job_id).problem for job_id in (unknown, flipped)}
    assert all(problems.values()) and {edit(job_id).state for job_id in problems} == {"failed"}
    assert problems[unknown]["errors"][0]["pointer"] == "/settings"  # type: ignore[index]
    assert problems[flipped]["title"] == "Damaged store"  # type: ignore[index]


def test_a_nan_loss_fails_the_edit(
    runner: Runner, registered: Model, add_edits: AddEdits, edit: ReadEdit, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = runner.context.pipelines.get(registered.id)
    weight = pipeline.encoder.output_matrix(3).weight
    monkeypatch.setattr(weight, "data", weight.data * float("nan"))
    (job_id,) = add_edits(registered, {})
    runner.work()
    problem = edit(job_id).problem
    assert edit(job_id).state == "failed" and edit(job_id).value is None
    assert problem is not None and problem["title"] == "Optimization diverged"


def test_an_edit_that_raises_fails_alone(
    runner: Runner, registered: Model, add_edits: AddEdits, edit: ReadEdit, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = editing.optimize_values

    def burst(pipeline: object, edits: Sequence[editing.ConceptEdit], **callbacks: object) -> object:
        if any(one.source == "poison" for one in edits):
            raise MemoryError("all of it")
        return optimize(pipeline, edits, **callbacks)  # type: ignore[arg-type]

    monkeypatch.setattr(editing, "optimize_values", burst, raising=False)
    first, poison, last = add_edits(registered, {}, {"source": "poison"}, {})
    runner.work()
    assert edit(first).state == edit(last).state == "ready"
    assert edit(poison).state == "failed" and edit(poison).problem == INTERNAL


def test_a_cancel_stops_one_edit_of_a_batch(
    runner: Runner,
    registered: Model,
    add_edits: AddEdits,
    edit: ReadEdit,
    job: Callable[[UUID], Job],
    factory: Sessions,
) -> None:
    kept, dropped = add_edits(registered, {"settings": {"objective": "text", "optimization_steps": 40}}, {})
    beat = runner.heartbeat.beat

    def cancel_then_beat() -> None:
        runner.heartbeat.beat = beat  # type: ignore[method-assign]
        with factory() as session:
            session.execute(update(Job).where(Job.id == dropped).values(cancel_requested=True))
            session.execute(update(Edit).where(Edit.id == job(dropped).target_id).values(state="cancelling"))
            session.commit()
        beat()

    runner.heartbeat.beat = cancel_then_beat  # type: ignore[method-assign]
    runner.heartbeat.interval = 0.01
    runner.work()
    assert edit(kept).state == "ready" and edit(kept).value is not None
    assert edit(dropped).state == job(dropped).state == "cancelled" and edit(dropped).value is None


def test_progress_is_written_to_the_job(
    runner: Runner, registered: Model, add_edits: AddEdits, job: Callable[[UUID], Job]
) -> None:
    slow = {
        "objective": "text",
        "optimization_steps": 400,
        "text_optimizer": "adam",
        "tolerance": 0.0,
    }  # L-BFGS ends between beats
    (job_id,) = add_edits(registered, {"settings": slow})
    runner.heartbeat.interval = 0.02
    runner.work()
    progress = job(job_id).progress
    assert progress is not None and progress["total"] == 400 and 0 < progress["done"] <= 400
    assert progress["text_loss"] > 0 and "noise_loss" not in progress


def test_the_audit_event_names_the_value(
    runner: Runner, registered: Model, add_edits: AddEdits, edit: ReadEdit, factory: Sessions
) -> None:
    (job_id,) = add_edits(registered, {})
    runner.work()
    with factory() as session:
        event = session.get_one(AuditEvent, 2)
    assert (event.actor, event.action, event.target) == ("worker", "edit.ready", f"edit:{edit(job_id).id}")
    row = edit(job_id)
    assert row.value is not None
    assert event.details == {"edit": str(row.id), "job": str(job_id), "attempt": 1, "value": row.value.sha256}


def test_the_pipeline_is_loaded_once(runner: Runner, registered: Model) -> None:
    assert runner.context.pipelines.get(registered.id) is runner.context.pipelines.get(registered.id)
