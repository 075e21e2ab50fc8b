"""Register base models and estimate their statistics."""

from uuid import UUID

from fastapi import APIRouter, Response

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep, SettingsDep, StoreDep
from app.api.routing import Route, accept_large_body
from app.api.work_routes import work_routes
from app.auth.dependencies import AdminPrincipal, ReadPrincipal
from app.models import queries, service
from app.models.errors import (
    ModelAlreadyExists,
    ModelNotFailed,
    ModelNotFound,
    ModelNotReady,
    StatisticsInProgress,
    StatisticsNotFound,
)
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
        session, model=model, namespace=settings.namespace, model_roots=settings.model_roots, actor=principal.actor
    )
    response.headers["Location"] = f"/v1/models/{registered.name}"
    return registered


@router.get("")
def list_models(session: SessionDep, _: ReadPrincipal, page: PageDep, link_next: NextPageLinkDep) -> Page[ModelOut]:
    """List base models, newest first."""
    return link_next(service.list_models(session, page=page))


@work_routes(
    router,
    "/{model}",
    ModelNotFound,
    find=lambda session, model: queries.get_model(session, name=model),
    follow="follow_model",
)
def get_model(session: SessionDep, model: str) -> ModelOut:
    """Read a base model: its family, encoders, digest, state and statistics."""
    return service.read_model(session, name=model)


@router.delete("/{model}", status_code=204, responses=documented(ModelNotFound, ModelNotFailed))
def delete_model(session: SessionDep, principal: AdminPrincipal, model: str) -> None:
    """Delete a model whose registration failed. Its name is free again; the audit log keeps it."""
    service.delete_model(session, name=model, actor=principal.actor)


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
        session, name=model, statistics=statistics, model_roots=settings.model_roots, store=store, actor=principal.actor
    )
    response.headers["Location"] = f"/v1/models/{model}/statistics/{created.id}"
    return created


@router.get("/{model}/statistics", responses=documented(ModelNotFound))
def list_statistics(
    session: SessionDep, _: ReadPrincipal, model: str, page: PageDep, link_next: NextPageLinkDep
) -> Page[StatisticsOut]:
    """List a model's statistics, newest first."""
    return link_next(service.list_statistics(session, name=model, page=page))


@work_routes(
    router,
    "/{model}/statistics/{statistics_id}",
    ModelNotFound,
    StatisticsNotFound,
    find=service.find_statistics,
    follow="follow_statistics",
)
def get_statistics(session: SessionDep, model: str, statistics_id: UUID) -> StatisticsOut:
    """Read an estimate: its state, progress and digest."""
    return service.read_statistics(session, model=model, statistics_id=statistics_id)
