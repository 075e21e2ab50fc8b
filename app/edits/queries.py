"""Reads of edits with what clients want to see beside them: the model's name, the job, the values without vectors."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.db.models import Edit, EditValue, Job, Model
from app.jobs.queries import latest_jobs
from emender.schemas.edits import EditOut, ValueOut


def filtered(
    *,
    model_id: UUID | None,
    state: str | None,
    source: str | None,
    source_part: str | None,
    created_by: str | None,
) -> Select[Edit]:
    query = select(Edit)
    if model_id is not None:
        query = query.where(Edit.model_id == model_id)
    if state is not None:
        query = query.where(Edit.state == state)
    if source is not None:
        query = query.where(Edit.source == source)
    if source_part is not None:
        query = query.where(Edit.source.icontains(source_part, autoescape=True))
    if created_by is not None:
        query = query.where(Edit.created_by == created_by)
    return query


def describe(session: Session, edits: Sequence[Edit]) -> list[EditOut]:
    """The edits as clients see them, in three reads however many they are."""
    ids = [edit.id for edit in edits]
    names = dict(
        session.execute(select(Model.id, Model.name).where(Model.id.in_({edit.model_id for edit in edits}))).all()
    )
    jobs = latest_jobs(session, ids)
    values = _values(session, ids)
    described = []
    for edit in edits:
        described.append(_out(edit, model=names[edit.model_id], job=jobs.get(edit.id), value=values.get(edit.id)))
    return described


def queued(row: Mapping[str, Any], *, model: Model, at: datetime) -> EditOut:
    """An edit that was inserted and queued just now, of which there is nothing else to read."""
    new: dict[str, Any] = {"progress": None, "attempt": 0, "problem": None, "value": None}
    return EditOut(**{**row, "model": model.name, **new, "created_at": at, "updated_at": at})


def _out(edit: Edit, *, model: str, job: Job | None, value: ValueOut | None) -> EditOut:
    return EditOut(
        id=edit.id,
        model=model,
        source=edit.source,
        destination=edit.destination,
        templates=edit.templates,
        settings=edit.settings,
        reason=edit.reason,
        labels=edit.labels,
        state=edit.state,
        progress=job.progress if job and job.state == "running" else None,
        attempt=job.attempt if job else 0,
        problem=edit.problem,
        value=value,
        created_by=edit.created_by,
        created_at=edit.created_at,
        updated_at=edit.updated_at,
    )


def _values(session: Session, ids: Sequence[UUID]) -> dict[UUID, ValueOut]:
    """The values by edit, without their vectors."""
    query = select(
        EditValue.edit_id,
        EditValue.sha256,
        EditValue.encoders,
        EditValue.losses["text"][-1].as_float(),
        EditValue.losses["noise"][-1].as_float(),
        EditValue.attempt,
        EditValue.engine,
        EditValue.balance,
    ).where(EditValue.edit_id.in_(ids))
    return {
        edit_id: ValueOut(**dict(zip(ValueOut.model_fields, columns, strict=True)))
        for edit_id, *columns in session.execute(query)
    }
