"""Register base models and estimate their statistics."""

from uuid import UUID

from fastapi import APIRouter, Response

from app.auth.dependencies import AdminPrincipal, ReadPrincipal
from app.dependencies import Page, PageDep, SessionDep, SettingsDep, StoreDep
from app.models import service
from app.models.errors import ModelExists, ModelNotFound, ModelNotReady, StatisticsNotFound, StatisticsUnderWay
from app.models.schemas import ModelCreate, ModelOut, StatisticsCreate, StatisticsOut
from app.problems import InsufficientStorage, documented
from app.routing import Route

router = APIRouter(prefix="/models", tags=["models"], route_class=Route)


@router.post("", status_code=202, responses=documented(ModelExists))
def register_model(
    session: SessionDep, settings: SettingsDep, principal: AdminPrincipal, model: ModelCreate, response: Response
) -> ModelOut:
    """Register a base model: a worker fetches it, checks that its weights are safetensors, and digests it."""
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
def list_models(session: SessionDep, _: ReadPrincipal, page: PageDep) -> Page[ModelOut]:
    """List base models, newest first."""
    return service.list_models(session, page=page)


@router.get("/{model}", responses=documented(ModelNotFound))
def get_model(session: SessionDep, _: ReadPrincipal, model: str) -> ModelOut:
    """A base model: family, encoders, digest, state and statistics."""
    return service.get_model(session, name=model)


@router.post(
    "/{model}/statistics",
    status_code=202,
    responses=documented(ModelNotFound, ModelNotReady, StatisticsUnderWay, InsufficientStorage),
)
def create_statistics(
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: AdminPrincipal,
    model: str,
    statistics: StatisticsCreate,
    response: Response,
) -> StatisticsOut:
    """Estimate the second moments C0 of the model's keys over captions; apply needs them once a model."""
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
def list_statistics(session: SessionDep, _: ReadPrincipal, model: str, page: PageDep) -> Page[StatisticsOut]:
    """List a model's statistics, newest first."""
    return service.list_statistics(session, name=model, page=page)


@router.get("/{model}/statistics/{statistics_id}", responses=documented(ModelNotFound, StatisticsNotFound))
def get_statistics(session: SessionDep, _: ReadPrincipal, model: str, statistics_id: UUID) -> StatisticsOut:
    """One estimate: its state, progress and digest."""
    return service.get_statistics(session, name=model, statistics_id=statistics_id)
