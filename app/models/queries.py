"""Reads of models with what clients want to see beside them."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from sqlalchemy import case, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.db.models import Model, Statistics


def find_model(session: Session, *, name: str, lock: bool = False) -> Model | None:
    if "\0" in name:
        return None
    query = select(Model).where(Model.name == name)
    return session.scalars(query.with_for_update() if lock else query).one_or_none()


def best_statistics(session: Session, *, model_ids: Sequence[UUID]) -> Mapping[UUID, Statistics]:
    """For each model its latest ready statistics, else its latest."""
    query = (
        select(Statistics)
        .where(Statistics.model_id.in_(model_ids))
        .ext(distinct_on(Statistics.model_id))
        .order_by(Statistics.model_id, case((Statistics.state == "ready", 0), else_=1), Statistics.id.desc())
    )
    return {row.model_id: row for row in session.scalars(query)}
