"""Ask for pictures and figures of a published version, and read them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints.queries import evaluations_of, methods_in
from app.checkpoints.service import ServedFile, find_checkpoint, find_model, require_served
from app.db.models import Checkpoint, Evaluation, JsonObject
from app.db.pagination import PageCursor
from app.evaluations.errors import ClassifierMissing, EvaluationFileNotFound, EvaluationHasEnded, EvaluationNotFound
from app.jobs.enqueue import enqueue
from app.jobs.kinds import EVALUATE_CHECKPOINT
from app.jobs.queries import cancel, latest_job, running_progress, work_status
from app.jobs.states import CANCELLED
from app.problems import Unprocessable
from emender.schemas.common import Page, WorkStatus
from emender.schemas.evaluations import FREE_PROMPTS, EvaluationCreate, EvaluationFile, EvaluationOut, PreviewCreate


def create_preview(
    session: Session,
    *,
    model_name: str,
    version: str,
    request: PreviewCreate,
    actor: str,
) -> EvaluationOut:
    """Queue pictures before and after. Raises what is said against the version."""
    checkpoint = find_checkpoint(session, model=find_model(session, name=model_name), revision=version)
    require_served(checkpoint)
    return _create(session, checkpoint=checkpoint, kind="preview", request=request.model_dump(), actor=actor)


def create_evaluation(
    session: Session, *, model_name: str, version: str, request: EvaluationCreate, actor: str
) -> EvaluationOut:
    """Queue the measurement of a version's edits by the model's classifier. Raises `ClassifierMissing`, and what is
    said against the version."""
    model = find_model(session, name=model_name)
    checkpoint = find_checkpoint(session, model=model, revision=version)
    require_served(checkpoint)
    if model.classifier is None:
        raise ClassifierMissing(model.name)
    if request.scales and "cross_attention" in methods_in(session, checkpoint_id=checkpoint.id).values():
        detail = "Edits of cross-attention are not built one without the other: leave `scales` out."
        raise Unprocessable.at("/scales", detail)
    return _create(session, checkpoint=checkpoint, kind="evaluation", request=request.model_dump(), actor=actor)


def request_check(session: Session, *, checkpoint: Checkpoint) -> None:
    """Queue the quick check of a version that has just been published, if its model has a classifier."""
    if checkpoint.model.classifier is not None and checkpoint.edits:
        suited = checkpoint.edits[0].edit.settings  # what its destination's pictures were drawn with
        request = EvaluationCreate(
            prompts=list(FREE_PROMPTS[:2]),
            held_out_prompts=list(FREE_PROMPTS[:1]),
            num_inference_steps=min(suited.get("num_inference_steps", 20), 20),
            guidance_scale=suited.get("guidance_scale", 7.5),
        )
        _create(session, checkpoint=checkpoint, kind="check", request=request.model_dump(), actor="worker")


def list_evaluations(
    session: Session, *, model_name: str, version: str, kind: str | None, page: PageCursor[UUID]
) -> Page[EvaluationOut]:
    """Newest first."""
    checkpoint = find_checkpoint(session, model=find_model(session, name=model_name), revision=version)
    rows, next_cursor = page.fetch(session, evaluations_of(checkpoint.id, kind=kind), Evaluation.id)
    return Page(items=_describe(session, rows), next=next_cursor)


def read_evaluation(session: Session, *, model_name: str, version: str, evaluation_id: UUID) -> EvaluationOut:
    return _describe(session, [_find(session, model_name=model_name, version=version, evaluation_id=evaluation_id)])[0]


def evaluation_status(session: Session, *, model_name: str, version: str, evaluation_id: UUID) -> WorkStatus:
    found = _find(session, model_name=model_name, version=version, evaluation_id=evaluation_id)
    return work_status(session, found)


def find_file(session: Session, *, model_name: str, version: str, evaluation_id: UUID, name: str) -> ServedFile:
    """A file of an evaluation, found by comparing its name with those that there are."""
    evaluation = _find(session, model_name=model_name, version=version, evaluation_id=evaluation_id)
    for file in evaluation.files:
        if file["name"] == name:
            return ServedFile(name, file["sha256"], file["size"], commit=evaluation.checkpoint.commit or "")
    raise EvaluationFileNotFound(name, ", ".join(file["name"] for file in evaluation.files))


def cancel_evaluation(
    session: Session, *, model_name: str, version: str, evaluation_id: UUID, actor: str
) -> EvaluationOut:
    """One that is queued ends at once; one at work is asked to stop. Cancelling twice changes nothing."""
    _find(session, model_name=model_name, version=version, evaluation_id=evaluation_id)
    job = latest_job(session, target_id=evaluation_id)
    evaluation = session.get_one(Evaluation, evaluation_id, with_for_update=True, populate_existing=True)
    if evaluation.state in ("ready", "failed"):
        raise EvaluationHasEnded(evaluation_id, evaluation.state)
    if (was := evaluation.state) in ("queued", "running") and not job.cancel_requested:
        if cancel(session, job):
            evaluation.state, evaluation.problem = "cancelled", CANCELLED
        session.flush()
        record(
            session,
            actor=actor,
            action="evaluation.cancel",
            target=_target(evaluation),
            details={"evaluation": str(evaluation.id)},
            before={"state": was, "cancel_requested": False},
            after={"state": evaluation.state, "cancel_requested": True},
        )
    return _describe(session, [evaluation])[0]


def _create(session: Session, *, checkpoint: Checkpoint, kind: str, request: JsonObject, actor: str) -> EvaluationOut:
    evaluation = Evaluation(checkpoint_id=checkpoint.id, kind=kind, request=request, created_by=actor)
    session.add(evaluation)
    session.flush()
    enqueue(session, kind=EVALUATE_CHECKPOINT, target_id=evaluation.id, actor=actor)
    details = {"evaluation": str(evaluation.id), "request": request}
    record(
        session,
        actor=actor,
        action=f"evaluation.{kind}",
        target=_target(evaluation),
        details=details,
        after={"state": "queued"},
    )
    session.refresh(evaluation)
    return _describe(session, [evaluation])[0]


def _find(session: Session, *, model_name: str, version: str, evaluation_id: UUID) -> Evaluation:
    checkpoint = find_checkpoint(session, model=find_model(session, name=model_name), revision=version)
    evaluation = session.get(Evaluation, evaluation_id, populate_existing=True)
    if evaluation is None or evaluation.checkpoint_id != checkpoint.id:
        raise EvaluationNotFound(f"v{checkpoint.number}", evaluation_id)
    return evaluation


def _describe(session: Session, rows: Sequence[Evaluation]) -> list[EvaluationOut]:
    progress = running_progress(session, target_ids=[row.id for row in rows])
    return [
        EvaluationOut(
            id=row.id,
            kind=row.kind,
            model=row.checkpoint.model.name,
            version=f"v{row.checkpoint.number}",
            state=row.state,
            request=row.request,
            progress=progress.get(row.id),
            report=row.report,
            files=[EvaluationFile(**file) for file in row.files],
            problem=row.problem,
            created_by=row.created_by,
            created_at=row.created_at,
        )
        for row in rows
    ]


def _target(evaluation: Evaluation) -> str:
    checkpoint = evaluation.checkpoint
    return f"checkpoint:{checkpoint.model.name}/v{checkpoint.number}"
