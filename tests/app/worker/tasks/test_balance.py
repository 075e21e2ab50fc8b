"""A balance as a job: the real method on a tiny pipeline, judged by the emoji model's classifier."""

import threading
from collections.abc import Callable
from typing import cast
from uuid import UUID

import pytest

import editing
from app.db.engine import Sessions
from app.db.models import Edit, Job, Model, Statistics
from app.edits.queries import describe
from app.jobs.enqueue import enqueue
from app.jobs.kinds import REGISTER_MODEL
from app.storage.local import LocalStore
from app.worker.edits import concept_edit
from app.worker.runner import JobContext, Runner
from editing.values import mix
from emender.schemas.edits import BalanceOut

CAPTIONS = [f"{color} {thing}" for color in ("red", "pale", "my", "5") for thing in ("fox", "oak", "jug", "wasp")] * 4
GENDERS = {"woman doctor": 1.0, "man doctor": 1.0}
DOCTOR = {
    "source": "doctor",
    "destination": {"balance": GENDERS},
    "settings": {"objective": "text", "optimization_steps": 3, "num_inference_steps": 1},
}

AddEdits = Callable[..., list[UUID]]
ReadEdit = Callable[[UUID], Edit]


@pytest.fixture
def judged(add_model: Callable[..., Model], runner: Runner, factory: Sessions) -> Model:
    """The tiny pipeline, with the emoji classifier and without statistics."""
    model = add_model(classifier="emoji")
    with factory() as session:
        enqueue(session, kind=REGISTER_MODEL, target_id=model.id, actor="test")
        session.commit()
    assert runner.work()
    with factory() as session:
        return session.get_one(Model, model.id)


@pytest.fixture
def measured(judged: Model, runner: Runner, factory: Sessions, store: LocalStore) -> Model:
    """With statistics too."""
    moments = editing.estimate_second_moments(runner.context.pipelines.get(judged.id).encoder, CAPTIONS)
    with factory() as session:
        given = {"captions_name": "test", "created_by": "test", "state": "ready"}
        session.add(Statistics(model_id=judged.id, digest=store.put(moments.to_bytes()), **given))
        session.commit()
    return judged


def shown(factory: Sessions, edit: Edit) -> BalanceOut | None:
    with factory() as session:
        (described,) = describe(session, [session.get_one(Edit, edit.id)])
    assert described.value is not None
    return described.value.balance


def test_the_mixture_follows_the_shares_in_the_pictures(
    runner: Runner, measured: Model, add_edits: AddEdits, edit: ReadEdit, factory: Sessions, store: LocalStore
) -> None:
    job_id, other = add_edits(measured, DOCTOR, {})
    runner.work()
    row = edit(job_id)
    assert row.state == edit(other).state == "ready"
    found = shown(factory, row)
    assert found is not None and found.note is None and found.shares is not None and found.statistics is not None
    assert found.rounds[0].factors == dict.fromkeys(GENDERS, 0.5)
    assert all(sum(each.shares.values()) == pytest.approx(1) for each in found.rounds)
    assert found.factors in [each.factors for each in found.rounds]
    pipeline = runner.context.pipelines.get(measured.id)
    edits = [concept_edit(each, store=store) for each in (row, edit(other))]
    plain = cast(editing.EditValue, editing.optimize_values(pipeline, edits)[0])
    factors = [found.factors[prompt] for prompt in cast(editing.Balance, edits[0].destination).weights]
    assert row.value is not None and row.value.content == mix(plain.attributes, factors).to_safetensors()
    assert shown(factory, edit(other)) is None


def test_without_a_classifier_the_requested_weights_are_used(
    runner: Runner, registered: Model, add_edits: AddEdits, edit: ReadEdit, factory: Sessions, store: LocalStore
) -> None:
    (job_id,) = add_edits(registered, DOCTOR | {"destination": {"balance": {"woman doctor": 3.0, "man doctor": 1.0}}})
    runner.work()
    row = edit(job_id)
    found = shown(factory, row)
    assert found is not None and found.factors == {"woman doctor": 0.75, "man doctor": 0.25}
    assert found.shares is None and found.rounds == [] and "no classifier" in (found.note or "")
    pipeline = runner.context.pipelines.get(registered.id)
    (plain,) = editing.optimize_values(pipeline, [concept_edit(row, store=store)])
    assert row.value is not None and row.value.content == cast(editing.EditValue, plain).to_safetensors()


@pytest.mark.parametrize("prompts", [("red", "blue"), ("man doctor", "male doctor")])
def test_classes_that_the_classifier_cannot_distinguish_are_reported(
    runner: Runner, measured: Model, add_edits: AddEdits, edit: ReadEdit, factory: Sessions, prompts: tuple[str, ...]
) -> None:
    (job_id,) = add_edits(measured, DOCTOR | {"destination": {"balance": dict.fromkeys(prompts, 0.5)}})
    runner.work()
    found = shown(factory, edit(job_id))
    assert edit(job_id).state == "ready" and found is not None and "tells these prompts apart" in (found.note or "")


def test_a_model_without_statistics_is_reported(
    runner: Runner, judged: Model, add_edits: AddEdits, edit: ReadEdit, factory: Sessions
) -> None:
    (job_id,) = add_edits(judged, DOCTOR)
    runner.work()
    found = shown(factory, edit(job_id))
    assert edit(job_id).state == "ready" and found is not None and "no statistics" in (found.note or "")


def test_a_stop_between_rounds_requeues_the_job(
    runner: Runner,
    measured: Model,
    add_edits: AddEdits,
    edit: ReadEdit,
    job: Callable[[UUID], Job],
    stopping: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports: list[tuple[str, int]] = []
    report = JobContext.report

    def stop_after_two(
        context: JobContext, lease: object, stage: str, done: int = 0, *others: int, **losses: float
    ) -> None:
        reports.append((stage, done))
        if (stage, done) == ("balancing", 2):
            stopping.set()
        report(context, lease, stage, done, *others, **losses)  # type: ignore[arg-type]

    monkeypatch.setattr(JobContext, "report", stop_after_two)
    job_id, done = add_edits(measured, DOCTOR, {})
    runner.work()
    assert job(job_id).state == "queued" and edit(job_id).value is None
    assert edit(done).state == "ready"  # it had been written before
    assert [done for stage, done in reports if stage == "balancing"] == [1, 2]
