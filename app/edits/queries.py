"""Reads of edits with what clients want to see beside them: the model's name, the job, the values without vectors."""

from collections import defaultdict
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
        described.append(_out(edit, model=names[edit.model_id], job=jobs.get(edit.id), values=values[edit.id]))
    return described


def losses(session: Session, *, edit_id: UUID) -> Sequence[tuple[str, list[float] | None, list[float] | None]]:
    """(encoder, text losses, noise losses) of a value."""
    query = select(EditValue.encoder, EditValue.losses["text"], EditValue.losses["noise"])
    rows = session.execute(query.where(EditValue.edit_id == edit_id).order_by(EditValue.encoder))
    return [(encoder, text, noise) for encoder, text, noise in rows]


def queued(row: Mapping[str, Any], *, model: Model, at: datetime) -> EditOut:
    """An edit that was inserted and queued just now, of which there is nothing else to read."""
    new: dict[str, Any] = {"progress": None, "attempt": 0, "problem": None, "values": []}
    return EditOut(**{**row, "model": model.name, **new, "created_at": at, "updated_at": at})


def _out(edit: Edit, *, model: str, job: Job | None, values: list[ValueOut]) -> EditOut:
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
        values=values,
        created_by=edit.created_by,
        created_at=edit.created_at,
        updated_at=edit.updated_at,
    )


def _values(session: Session, ids: Sequence[UUID]) -> Mapping[UUID, list[ValueOut]]:
    losses = EditValue.losses
    query = (
        select(
            EditValue.edit_id,
            EditValue.encoder,
            EditValue.layer,
            EditValue.sha256,
            losses["text"][-1].as_float(),
            losses["noise"][-1].as_float(),
            losses["delta_norm"].as_float(),
            losses["hidden_norm"].as_float(),
            EditValue.attempt,
            EditValue.engine,
            losses["balance"],
        )
        .where(EditValue.edit_id.in_(ids))
        .order_by(EditValue.encoder)
    )
    values: dict[UUID, list[ValueOut]] = defaultdict(list)
    for edit_id, *columns in session.execute(query):
        values[edit_id].append(ValueOut(**dict(zip(ValueOut.model_fields, columns, strict=True))))
    return values
