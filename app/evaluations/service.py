"""Request previews and evaluations of published checkpoints, and read them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints.queries import edit_methods, get_published_checkpoint, select_evaluations
from app.checkpoints.service import find_checkpoint
from app.db.models import Checkpoint, Evaluation
from app.db.pagination import PageCursor
from app.db.rows import column_values
from app.evaluations import errors
from app.jobs.enqueue import enqueue
from app.jobs.kinds import EVALUATE_CHECKPOINT
from app.jobs.queries import cancel, latest_job, running_progress
from app.jobs.states import CANCELLED
from app.models.queries import family_of, get_model
from app.problems import Unprocessable
from editing.files import File
from emender.schemas.checkpoints import UCE_METHODS
from emender.schemas.common import Page
from emender.schemas.evaluations import FREE_PROMPTS, EvaluationCreate, EvaluationKind, EvaluationOut, PreviewCreate


def create_preview(
    session: Session, *, model_name: str, revision: str, request: PreviewCreate, actor: str
) -> EvaluationOut:
    """Enqueue pictures by the base model and by the checkpoint. Raises the problem of the checkpoint."""
    model = get_model(session, name=model_name)
    checkpoint = get_published_checkpoint(session, model=model, revision=revision)
    return _create(session, checkpoint=checkpoint, kind="preview", request=request, actor=actor)


def create_evaluation(
    session: Session, *, model_name: str, revision: str, request: EvaluationCreate, actor: str
) -> EvaluationOut:
    """Enqueue the measurement of a checkpoint's edits by the model's classifier.

    Raises `ClassifierMissing`, or the problem of the checkpoint.
    """
    model = get_model(session, name=model_name)
    checkpoint = get_published_checkpoint(session, model=model, revision=revision)
    if model.classifier is None:
        raise errors.ClassifierMissing(
            f"The model {model_name!r} has no classifier. Register a model with a `classifier`, or request previews."
        )
    if request.scales and {*UCE_METHODS} & {*edit_methods(session, checkpoint_id=checkpoint.id).values()}:
        detail = "Edits by UCE cannot be built separately: leave `scales` out."
        raise Unprocessable.at("/scales", detail)
    return _create(session, checkpoint=checkpoint, kind="evaluation", request=request, actor=actor)


def request_check(session: Session, *, checkpoint: Checkpoint) -> None:
    """Enqueue the quick check of a checkpoint that was just published, if its model has a classifier."""
    if checkpoint.model.classifier is not None and checkpoint.edits:
        settings = checkpoint.edits[0].edit.settings  # those that its destination was drawn with
        request = EvaluationCreate(
            prompts=list(FREE_PROMPTS[:2]),
            held_out_prompts=list(FREE_PROMPTS[:1]),
            num_inference_steps=min(settings.get("num_inference_steps", 20), 20),
            guidance_scale=settings.get("guidance_scale"),
        )
        _create(session, checkpoint=checkpoint, kind="check", request=request, actor="worker")


def list_evaluations(
    session: Session, *, model_name: str, revision: str, kind: EvaluationKind | None, page: PageCursor[UUID]
) -> Page[EvaluationOut]:
    checkpoint = find_checkpoint(session, model=model_name, revision=revision)
    rows, next_cursor = page.fetch(session, select_evaluations(checkpoint.id, kind=kind), Evaluation.id)
    return Page(items=_evaluations_out(session, rows), next=next_cursor)


def read_evaluation(session: Session, *, model_name: str, revision: str, evaluation_id: UUID) -> EvaluationOut:
    row = find_evaluation(session, model=model_name, revision=revision, evaluation_id=evaluation_id)
    return _evaluations_out(session, [row])[0]


def find_file(session: Session, *, model_name: str, revision: str, evaluation_id: UUID, name: str) -> File:
    """Return a file of an evaluation. Its name is compared with those of the files."""
    row = find_evaluation(session, model=model_name, revision=revision, evaluation_id=evaluation_id)
    files = {file["path"]: File(**file) for file in row.files}
    if name not in files:
        raise errors.EvaluationFileNotFound(
            f"The evaluation has no file {name[:200]!r}; it has {', '.join(files) or 'none yet'}."
        )
    return files[name]


def cancel_evaluation(
    session: Session, *, model_name: str, revision: str, evaluation_id: UUID, actor: str
) -> EvaluationOut:
    """Cancel a queued evaluation, or ask the worker to stop a running one. Does nothing the second time."""
    find_evaluation(session, model=model_name, revision=revision, evaluation_id=evaluation_id)
    job = latest_job(session, target_id=evaluation_id)
    evaluation = session.get_one(Evaluation, evaluation_id, with_for_update=True, populate_existing=True)
    state = evaluation.state
    if state in ("ready", "failed"):
        raise errors.EvaluationAlreadyFinished(
            f"The evaluation {evaluation_id} is {state}; only a queued or running one can be cancelled."
        )
    if state in ("queued", "running") and not job.cancel_requested:
        if cancel(session, job):
            evaluation.state, evaluation.problem = "cancelled", CANCELLED
        session.flush()
        target, details = evaluation.checkpoint.audit_target, {"evaluation": str(evaluation.id)}
        before = {"state": state, "cancel_requested": False}
        after = {"state": evaluation.state, "cancel_requested": True}
        record(
            session, actor=actor, action="evaluation.cancel", target=target, details=details, before=before, after=after
        )
    return _evaluations_out(session, [evaluation])[0]


def _create(
    session: Session,
    *,
    checkpoint: Checkpoint,
    kind: EvaluationKind,
    request: PreviewCreate | EvaluationCreate,
    actor: str,
) -> EvaluationOut:
    body = family_of(checkpoint.model).complete_sampling(request.model_dump())
    row = Evaluation(checkpoint_id=checkpoint.id, kind=kind, request=body, created_by=actor)
    session.add(row)
    session.flush()
    enqueue(session, kind=EVALUATE_CHECKPOINT, target_id=row.id, actor=actor)
    details, after = {"evaluation": str(row.id), "request": row.request}, {"state": "queued"}
    target = checkpoint.audit_target
    record(session, actor=actor, action=f"evaluation.{kind}", target=target, details=details, after=after)
    session.refresh(row)
    return _evaluations_out(session, [row])[0]


def find_evaluation(session: Session, *, model: str, revision: str, evaluation_id: UUID) -> Evaluation:
    """Return the evaluation as it is now. Raises `EvaluationNotFound`, or the problem of the model or checkpoint."""
    checkpoint = find_checkpoint(session, model=model, revision=revision)
    row = session.get(Evaluation, evaluation_id, populate_existing=True)
    if row is None or row.checkpoint_id != checkpoint.id:
        raise errors.EvaluationNotFound(
            f"{checkpoint.version} has no evaluation {evaluation_id}; "
            f"GET /v1/models/{model}/checkpoints/{checkpoint.version}/evaluations lists them."
        )
    return row


def _evaluations_out(session: Session, rows: Sequence[Evaluation]) -> list[EvaluationOut]:
    progress = running_progress(session, target_ids=[row.id for row in rows])
    return [
        EvaluationOut(
            **column_values(row),
            model=row.checkpoint.model.name,
            version=row.checkpoint.version,
            progress=progress.get(row.id),
        )
        for row in rows
    ]
