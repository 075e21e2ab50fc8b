"""What the evaluation calls read from the database."""

from uuid import UUID

from sqlalchemy import Select, select

from app.db.models import Evaluation


def of_checkpoint(checkpoint_id: UUID, *, kind: str | None) -> Select[Evaluation]:
    query = select(Evaluation).where(Evaluation.checkpoint_id == checkpoint_id)
    return query.where(Evaluation.kind == kind) if kind else query
