"""Draw and measure published versions."""

from functools import partial
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep, StoreDep
from app.api.routing import Route
from app.api.waiting import EVENTS, LastEventId, WaitDep, WatchDep
from app.auth.dependencies import ApplyPrincipal, ReadPrincipal
from app.checkpoints.delivery import deliver
from app.checkpoints.errors import (
    CheckpointNotFound,
    CheckpointNotPublished,
    CheckpointRetracted,
    FileUnreadable,
    RangeNotSatisfiable,
)
from app.evaluations import service
from app.evaluations.errors import ClassifierMissing, EvaluationFileNotFound, EvaluationHasEnded, EvaluationNotFound
from app.models.errors import ModelNotFound
from app.problems import documented
from emender.schemas.checkpoints import VERSION
from emender.schemas.common import Page
from emender.schemas.evaluations import EvaluationCreate, EvaluationKind, EvaluationOut, PreviewCreate
from emender.schemas.text import Text

router = APIRouter(prefix="/models/{model}/checkpoints/{version}", route_class=Route, tags=["evaluations"])

ModelName = Annotated[Text, Path(max_length=96, examples=["emoji"])]
Version = Annotated[str, Path(pattern=VERSION, examples=["v3"])]
NO_VERSION = (ModelNotFound, CheckpointNotFound)


@router.post(
    "/previews",
    status_code=202,
    responses={
        202: {"headers": {"Location": {"description": "the evaluation", "schema": {"type": "string"}}}},
        **documented(*NO_VERSION, CheckpointNotPublished, CheckpointRetracted),
    },
)
def create_preview(
    session: SessionDep,
    principal: ApplyPrincipal,
    model: ModelName,
    version: Version,
    preview: PreviewCreate,
    response: Response,
) -> EvaluationOut:
    """Draw prompts with the base model and with the version, at the same seeds, beside each other in one picture."""
    created = service.create_preview(
        session,
        model_name=model,
        version=version,
        request=preview,
        actor=principal.actor,
    )
    response.headers["Location"] = f"/v1/models/{model}/checkpoints/{version}/evaluations/{created.id}"
    return created


@router.post(
    "/evaluations",
    status_code=202,
    responses={
        202: {"headers": {"Location": {"description": "the evaluation", "schema": {"type": "string"}}}},
        **documented(*NO_VERSION, CheckpointNotPublished, CheckpointRetracted, ClassifierMissing),
    },
)
def create_evaluation(
    session: SessionDep,
    principal: ApplyPrincipal,
    model: ModelName,
    version: Version,
    evaluation: EvaluationCreate,
    response: Response,
) -> EvaluationOut:
    """Measure a version with the model's classifier: which edits succeeded, and what they cost other concepts.

    Its files: `report.json`, `report.md`, `before-after.png`, and with `scales` a plot, `scales.png`.
    """
    created = service.create_evaluation(
        session, model_name=model, version=version, request=evaluation, actor=principal.actor
    )
    response.headers["Location"] = f"/v1/models/{model}/checkpoints/{version}/evaluations/{created.id}"
    return created


@router.get("/evaluations", responses=documented(*NO_VERSION))
def list_evaluations(
    session: SessionDep,
    _: ReadPrincipal,
    model: ModelName,
    version: Version,
    page: PageDep,
    link_next: NextPageLinkDep,
    kind: Annotated[EvaluationKind | None, Query()] = None,
) -> Page[EvaluationOut]:
    """List what was drawn and measured of a version, newest first."""
    return link_next(service.list_evaluations(session, model_name=model, version=version, kind=kind, page=page))


@router.get("/evaluations/{evaluation_id}", responses=documented(*NO_VERSION, EvaluationNotFound))
async def read_evaluation(
    watch: WatchDep, _: ReadPrincipal, model: ModelName, version: Version, evaluation_id: UUID, wait: WaitDep
) -> EvaluationOut:
    """Read one: its state, progress, report and files."""
    named: dict[str, Any] = {"model_name": model, "version": version, "evaluation_id": evaluation_id}
    status, read = partial(service.evaluation_status, **named), partial(service.read_evaluation, **named)
    return await watch.settled(status, read, seconds=wait)


@router.get(
    "/evaluations/{evaluation_id}/events",
    response_class=StreamingResponse,
    responses={**EVENTS, **documented(*NO_VERSION, EvaluationNotFound)},
)
async def follow_evaluation(
    watch: WatchDep,
    _: ReadPrincipal,
    model: ModelName,
    version: Version,
    evaluation_id: UUID,
    last_event_id: LastEventId = None,
) -> Response:
    """Follow a preview or an evaluation. Each event tells its state and progress whole; `Last-Event-ID` resumes."""
    status = partial(service.evaluation_status, model_name=model, version=version, evaluation_id=evaluation_id)
    return await watch.events(status, known=last_event_id)


FILE = "/evaluations/{evaluation_id}/files/{name}"


@router.head(FILE, include_in_schema=False)
@router.get(
    FILE,
    response_class=Response,
    responses={
        200: {
            "content": {"image/png": {}, "application/json": {}, "text/markdown": {}},
            "description": "The file; its ETag is its sha256",
        },
        206: {"description": "The range that was asked for"},
        302: {"description": "At the Location, a signed URL of the bucket that has the file"},
        304: {"description": "The file has the ETag in If-None-Match"},
        **documented(*NO_VERSION, EvaluationNotFound, EvaluationFileNotFound, RangeNotSatisfiable, FileUnreadable),
    },
)
def read_file(
    session: SessionDep,
    store: StoreDep,
    _: ReadPrincipal,
    request: Request,
    model: ModelName,
    version: Version,
    evaluation_id: UUID,
    name: str,
) -> Response:
    """Download a picture or a report."""
    file = service.find_file(session, model_name=model, version=version, evaluation_id=evaluation_id, name=name)
    return deliver(request, file, store=store, headers={})


@router.post(
    "/evaluations/{evaluation_id}/cancel",
    status_code=202,
    responses=documented(*NO_VERSION, EvaluationNotFound, EvaluationHasEnded),
)
def cancel_evaluation(
    session: SessionDep, principal: ApplyPrincipal, model: ModelName, version: Version, evaluation_id: UUID
) -> EvaluationOut:
    """Cancel one: at once while it is queued, at its next picture while it is drawn."""
    return service.cancel_evaluation(
        session, model_name=model, version=version, evaluation_id=evaluation_id, actor=principal.actor
    )
