"""Register base models and estimate their statistics."""

from functools import partial
from uuid import UUID

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep, SettingsDep, StoreDep
from app.api.routing import Route, accept_large_body
from app.api.waiting import EVENTS, LastEventId, WaitDep, WatcherDep
from app.auth.dependencies import AdminPrincipal, ReadPrincipal
from app.models import service
from app.models.errors import ModelAlreadyExists, ModelNotFound, ModelNotReady, StatisticsInProgress, StatisticsNotFound
from app.problems import InsufficientStorage, documented
from emender.schemas.common import Page
from emender.schemas.models import ModelCreate, ModelOut, StatisticsCreate, StatisticsOut

router = APIRouter(prefix="/models", tags=["models"], route_class=Route)


@router.post("", status_code=202, responses=documented(ModelAlreadyExists))
def register_model(
    session: SessionDep, settings: SettingsDep, principal: AdminPrincipal, model: ModelCreate, response: Response
) -> ModelOut:
    """Register a base model. A worker fetches it, checks that its weights are safetensors, and computes its digest."""
    registered = service.register_model(
        session,
        model=model,
        namespace=settings.namespace,
        model_roots=settings.model_roots,
        actor=principal.actor,
    )
    response.headers["Location"] = f"/v1/models/{registered.name}"
    return registered


@router.get("")
def list_models(session: SessionDep, _: ReadPrincipal, page: PageDep, link_next: NextPageLinkDep) -> Page[ModelOut]:
    """List base models, newest first."""
    return link_next(service.list_models(session, page=page))


@router.get("/{model}", responses=documented(ModelNotFound))
async def get_model(watcher: WatcherDep, _: ReadPrincipal, model: str, wait: WaitDep) -> ModelOut:
    """Read a base model: its family, encoders, digest, state and statistics."""
    status, read = partial(service.model_status, name=model), partial(service.read_model, name=model)
    return await watcher.wait_until_done(status, read, seconds=wait)


@router.get("/{model}/events", response_class=StreamingResponse, responses={**EVENTS, **documented(ModelNotFound)})
async def follow_model(
    watcher: WatcherDep, _: ReadPrincipal, model: str, last_event_id: LastEventId = None
) -> Response:
    """Follow a registration. Each event has the whole state and progress; `Last-Event-ID` resumes."""
    return await watcher.stream_events(partial(service.model_status, name=model), last_event_id=last_event_id)


@router.post(
    "/{model}/statistics",
    status_code=202,
    responses=documented(ModelNotFound, ModelNotReady, StatisticsInProgress, InsufficientStorage),
)
@accept_large_body
def create_statistics(
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: AdminPrincipal,
    model: str,
    statistics: StatisticsCreate,
    response: Response,
) -> StatisticsOut:
    """Estimate the second moments C0 of the model's keys over captions. Apply needs them once per model."""
    created = service.create_statistics(
        session,
        name=model,
        statistics=statistics,
        model_roots=settings.model_roots,
        store=store,
        actor=principal.actor,
    )
    response.headers["Location"] = f"/v1/models/{model}/statistics/{created.id}"
    return created


@router.get("/{model}/statistics", responses=documented(ModelNotFound))
def list_statistics(
    session: SessionDep, _: ReadPrincipal, model: str, page: PageDep, link_next: NextPageLinkDep
) -> Page[StatisticsOut]:
    """List a model's statistics, newest first."""
    return link_next(service.list_statistics(session, name=model, page=page))


@router.get("/{model}/statistics/{statistics_id}", responses=documented(ModelNotFound, StatisticsNotFound))
async def get_statistics(
    watcher: WatcherDep, _: ReadPrincipal, model: str, statistics_id: UUID, wait: WaitDep
) -> StatisticsOut:
    """Read an estimate: its state, progress and digest."""
    status = partial(service.statistics_status, name=model, statistics_id=statistics_id)
    read = partial(service.read_statistics, name=model, statistics_id=statistics_id)
    return await watcher.wait_until_done(status, read, seconds=wait)


@router.get(
    "/{model}/statistics/{statistics_id}/events",
    response_class=StreamingResponse,
    responses={**EVENTS, **documented(ModelNotFound, StatisticsNotFound)},
)
async def follow_statistics(
    watcher: WatcherDep, _: ReadPrincipal, model: str, statistics_id: UUID, last_event_id: LastEventId = None
) -> Response:
    """Follow an estimate. Each event has the whole state and progress; `Last-Event-ID` resumes."""
    status = partial(service.statistics_status, name=model, statistics_id=statistics_id)
    return await watcher.stream_events(status, last_event_id=last_event_id)
