"""Reads of edits with what clients want to see beside them: the model's name, the job, the values without vectors."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.db.models import Edit, EditValue, Job, Model
from app.db.rows import column_values
from app.jobs.queries import latest_jobs
from emender.schemas.edits import EditOut, ValueOut


def filtered(
    *, model_id: UUID | None, state: str | None, source: str | None, source_part: str | None, created_by: str | None
) -> Select[Edit]:
    values = {"model_id": model_id, "state": state, "source": source, "created_by": created_by}
    query = select(Edit).filter_by(**{name: value for name, value in values.items() if value is not None})
    if source_part is not None:
        query = query.where(Edit.source.icontains(source_part, autoescape=True))
    return query


def describe(session: Session, edits: Sequence[Edit]) -> list[EditOut]:
    """Describe the edits for clients, in three reads however many they are."""
    ids = [edit.id for edit in edits]
    models = select(Model.id, Model.name).where(Model.id.in_({edit.model_id for edit in edits}))
    names = dict(session.execute(models).all())
    jobs = latest_jobs(session, ids)
    values = _values(session, ids)
    return [
        _edit_out(edit, model=names[edit.model_id], job=jobs.get(edit.id), value=values.get(edit.id)) for edit in edits
    ]


def _edit_out(edit: Edit, *, model: str, job: Job | None, value: ValueOut | None) -> EditOut:
    work = {"progress": job.progress if job and job.state == "running" else None, "attempt": job.attempt if job else 0}
    return EditOut(**column_values(edit) | work, model=model, value=value)


def _values(session: Session, ids: Sequence[UUID]) -> dict[UUID, ValueOut]:
    """Return the values by edit, without their vectors."""
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
