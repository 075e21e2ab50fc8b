"""Find models by name, and their statistics."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from sqlalchemy import case, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.db.models import Model, Statistics
from app.models.errors import ModelNotFound, ModelNotReady
from editing.families.family import Family
from editing.families.registry import FAMILIES
from emender.schemas.checkpoints import Method


def find_model(session: Session, *, name: str, lock: bool = False) -> Model | None:
    """Return the model of that name, if there is one.

    A lock serializes the transactions that lock it. It does not block new rows that reference the model.
    """
    if "\0" in name:
        return None
    query = select(Model).where(Model.name == name)
    return session.scalars(query.with_for_update(key_share=True) if lock else query).one_or_none()


def get_model(session: Session, *, name: str, lock: bool = False) -> Model:
    """Return the model of that name. Raises `ModelNotFound`."""
    model = find_model(session, name=name, lock=lock)
    if model is None:
        raise ModelNotFound(f"There is no model {name!r}; GET /v1/models lists them.")
    return model


def get_ready_model(session: Session, *, name: str, lock: bool = False) -> Model:
    """Return a model that can be edited. Raises `ModelNotFound` or `ModelNotReady`."""
    query = select(Model).where(Model.name == name)
    query = query.with_for_update(key_share=True) if lock else query
    model = session.scalars(query).one_or_none() if "\0" not in name else None
    if model is None:
        raise ModelNotFound(f"There is no model {name!r}; GET /v1/models lists them.")
    if model.state != "ready":
        raise ModelNotReady(f"The model {name!r} is {model.state}, not ready; see GET /v1/models/{name}.")
    return model


def family_of(model: Model) -> Family:
    """Return the family of a ready model."""
    return FAMILIES[model.family or ""]


def list_methods(model: Model) -> list[Method]:
    """Return the methods of an apply that the model takes; none before it is ready."""
    return ["text_encoder", family_of(model).projection_method] if model.family else []


def newest_statistics(session: Session, *, model_id: UUID, states: Sequence[str] = ("ready",)) -> Statistics | None:
    """Return the newest statistics of a model in one of the states."""
    query = select(Statistics).where(Statistics.model_id == model_id, Statistics.state.in_(states))
    return session.scalars(query.order_by(Statistics.id.desc()).limit(1)).one_or_none()


def best_statistics(session: Session, *, model_ids: Sequence[UUID]) -> Mapping[UUID, Statistics]:
    """Return the newest ready statistics of each model, or the newest ones if none are ready."""
    query = (
        select(Statistics)
        .where(Statistics.model_id.in_(model_ids))
        .ext(distinct_on(Statistics.model_id))
        .order_by(Statistics.model_id, case((Statistics.state == "ready", 0), else_=1), Statistics.id.desc())
    )
    return {row.model_id: row for row in session.scalars(query)}
