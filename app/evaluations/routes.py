"""Request and read previews and evaluations of published checkpoints."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep, StoreDep
from app.api.file_response import file_route, send_file
from app.api.routing import Route
from app.api.work_routes import work_routes
from app.auth.dependencies import ApplyPrincipal, ReadPrincipal
from app.checkpoints.errors import CheckpointNotFound, CheckpointNotPublished, CheckpointRetracted
from app.checkpoints.routes import ModelName, Revision
from app.evaluations import errors, service
from app.models.errors import ModelNotFound
from app.problems import documented
from emender.schemas.common import Page
from emender.schemas.evaluations import EvaluationCreate, EvaluationKind, EvaluationOut, PreviewCreate

router = APIRouter(prefix="/models/{model}/checkpoints/{revision}", route_class=Route, tags=["evaluations"])

NO_CHECKPOINT = (ModelNotFound, CheckpointNotFound)
NOT_SERVED = (*NO_CHECKPOINT, CheckpointNotPublished, CheckpointRetracted)
LOCATION: dict[int | str, dict[str, Any]] = {
    202: {"headers": {"Location": {"description": "the evaluation", "schema": {"type": "string"}}}}
}


@router.post("/previews", status_code=202, responses=LOCATION | documented(*NOT_SERVED))
def create_preview(
    session: SessionDep,
    principal: ApplyPrincipal,
    model: ModelName,
    revision: Revision,
    preview: PreviewCreate,
    response: Response,
) -> EvaluationOut:
    """Draw prompts with the base model and with the checkpoint at the same seeds, side by side in one picture."""
    created = service.create_preview(
        session, model_name=model, revision=revision, request=preview, actor=principal.actor
    )
    response.headers["Location"] = _url(created)
    return created


@router.post("/evaluations", status_code=202, responses=LOCATION | documented(*NOT_SERVED, errors.ClassifierMissing))
def create_evaluation(
    session: SessionDep,
    principal: ApplyPrincipal,
    model: ModelName,
    revision: Revision,
    evaluation: EvaluationCreate,
    response: Response,
) -> EvaluationOut:
    """Measure a checkpoint with the model's classifier: which edits succeeded, and what they cost other concepts.

    Its files are `report.json`, `report.md`, `before-after.png` and, with `scales`, a plot `scales.png`.
    """
    created = service.create_evaluation(
        session, model_name=model, revision=revision, request=evaluation, actor=principal.actor
    )
    response.headers["Location"] = _url(created)
    return created


def _url(created: EvaluationOut) -> str:
    return f"/v1/models/{created.model}/checkpoints/{created.version}/evaluations/{created.id}"


@router.get("/evaluations", responses=documented(*NO_CHECKPOINT))
def list_evaluations(
    session: SessionDep,
    _: ReadPrincipal,
    model: ModelName,
    revision: Revision,
    page: PageDep,
    link_next: NextPageLinkDep,
    kind: Annotated[EvaluationKind | None, Query()] = None,
) -> Page[EvaluationOut]:
    """List the previews and evaluations of a checkpoint, newest first."""
    return link_next(service.list_evaluations(session, model_name=model, revision=revision, kind=kind, page=page))


@work_routes(
    router,
    "/evaluations/{evaluation_id}",
    *NO_CHECKPOINT,
    errors.EvaluationNotFound,
    find=service.find_evaluation,
    follow="follow_evaluation",
)
def read_evaluation(session: SessionDep, model: ModelName, revision: Revision, evaluation_id: UUID) -> EvaluationOut:
    """Read an evaluation: its state, progress, report and files."""
    return service.read_evaluation(session, model_name=model, revision=revision, evaluation_id=evaluation_id)


@file_route(
    router,
    "/evaluations/{evaluation_id}/files/{name}",
    *NO_CHECKPOINT,
    errors.EvaluationNotFound,
    errors.EvaluationFileNotFound,
    media_types=("image/png", "application/json", "text/markdown"),
)
def read_file(
    session: SessionDep,
    store: StoreDep,
    _: ReadPrincipal,
    request: Request,
    model: ModelName,
    revision: Revision,
    evaluation_id: UUID,
    name: str,
) -> Response:
    """Download a picture or a report."""
    file = service.find_file(session, model_name=model, revision=revision, evaluation_id=evaluation_id, name=name)
    return send_file(request, file, store=store)


@router.post(
    "/evaluations/{evaluation_id}/cancel",
    status_code=202,
    responses=documented(*NO_CHECKPOINT, errors.EvaluationNotFound, errors.EvaluationAlreadyFinished),
)
def cancel_evaluation(
    session: SessionDep, principal: ApplyPrincipal, model: ModelName, revision: Revision, evaluation_id: UUID
) -> EvaluationOut:
    """Cancel an evaluation: at once while it is queued, before its next picture while it runs."""
    return service.cancel_evaluation(
        session, model_name=model, revision=revision, evaluation_id=evaluation_id, actor=principal.actor
    )
