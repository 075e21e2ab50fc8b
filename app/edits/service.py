"""Ask for edits, follow them, cancel and retry them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import numpy
from safetensors.numpy import save
from sqlalchemy import Row, Table, insert, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.audit.service import record
from app.db.models import Edit, EditValue, Model
from app.dependencies import PageRequest
from app.edits import queries
from app.edits.errors import EditHasEnded, EditNotFound, EditNotReady, EditNotRetryable
from app.edits.schemas import EditBatchOut, EditCreate, EditOut, EditRef, Losses
from app.edits.validation import check
from app.models.errors import ModelNotFound, ModelNotReady
from app.models.queries import find_model
from app.models.tokenizers import tokenizers_of
from app.queueing.jobs import cancel, latest_job, work_status
from app.queueing.outbox import enqueue, enqueue_many
from app.queueing.states import CANCELLED
from app.schemas import Page, WorkStatus
from app.storage.store import BlobCorrupt, Store

KIND = "optimize_edit"


def create_edit(session: Session, *, model: str, edit: EditCreate, store: Store, folder: Path, actor: str) -> EditOut:
    """Check the edit against the model and queue it. `folder` is the service's, where tokenizers are laid out.

    Raises `ModelNotFound`, `ModelNotReady`, or `Unprocessable` naming the field.
    """
    row = _checked_model(session, name=model, edits={"": edit}, store=store, folder=folder)
    (inserted,) = _insert(session, model=row, edits=[edit], actor=actor)
    enqueue(session, kind=KIND, target_id=inserted.id, actor=actor)
    details = {"model": row.name, "source": edit.source, "destination": _kept(edit), "reason": edit.reason}
    record(
        session,
        actor=actor,
        action="edit.create",
        target=f"edit:{inserted.id}",
        details=details,
        after={"state": "queued"},
        reason=edit.reason,
    )
    return queries.queued(inserted, model=row)


def create_edits(
    session: Session, *, model: str, edits: Sequence[EditCreate], store: Store, folder: Path, actor: str
) -> EditBatchOut:
    """The same for many, all or none; one audit event names them all.

    Two edits of one source in a batch are taken, as they are from two requests: which of them an apply writes is
    chosen there, and it reports the conflict.
    """
    by_pointer = {f"/{index}": edit for index, edit in enumerate(edits)}
    row = _checked_model(session, name=model, edits=by_pointer, store=store, folder=folder)
    ids = [edit.id for edit in _insert(session, model=row, edits=edits, actor=actor)]
    enqueue_many(session, kind=KIND, target_ids=ids, actor=actor)
    details = {"count": len(ids), "edits": [str(edit_id) for edit_id in ids]}
    reasons = {edit.reason for edit in edits}
    record(
        session,
        actor=actor,
        action="edit.create_batch",
        target=f"model:{row.name}",
        details=details,
        reason=reasons.pop() if len(reasons) == 1 else None,  # else each edit has its own
    )
    refs = [EditRef(id=edit_id, source=edit.source) for edit_id, edit in zip(ids, edits, strict=True)]
    return EditBatchOut(count=len(refs), edits=refs)


def list_edits(
    session: Session,
    *,
    page: PageRequest[UUID],
    model: str | None = None,
    state: str | None = None,
    source: str | None = None,
    source_part: str | None = None,
    created_by: str | None = None,
) -> Page[EditOut]:
    """Newest first. `source` is one whole, `source_part` some of it in whatever case."""
    query = queries.filtered(model=model, state=state, source=source, source_part=source_part, created_by=created_by)
    rows = session.scalars(page.select(query, Edit.id)).all()
    return page.page(rows, queries.describe(session, rows), [row.id for row in rows])


def get_edit(session: Session, *, edit_id: UUID) -> EditOut:
    edit = session.get(Edit, edit_id, populate_existing=True)
    if edit is None:
        raise EditNotFound(edit_id)
    return queries.describe(session, [edit])[0]


def edit_status(session: Session, *, edit_id: UUID) -> WorkStatus:
    edit = session.get(Edit, edit_id)
    if edit is None:
        raise EditNotFound(edit_id)
    return work_status(session, edit)


def losses(session: Session, *, edit_id: UUID) -> dict[str, Losses]:
    """The losses of each step of stage I, by text encoder; empty until the edit is ready."""
    return {
        encoder: Losses(text=text or [], noise=noise or [])
        for encoder, text, noise in queries.losses(session, edit_id=edit_id)
    }


def value_file(session: Session, *, edit_id: UUID) -> bytes:
    """The value vectors as safetensors: `<encoder>.delta` and `<encoder>.hidden`, each float32 `(width,)`.

    δ is what the encoder's output at the value's layer needs added, h the output that it had. Raises `EditNotReady`,
    and `BlobCorrupt` where the vectors do not have the sha256 under which they were written.
    """
    edit = session.get(Edit, edit_id)
    if edit is None:
        raise EditNotFound(edit_id)
    if edit.state != "ready":
        raise EditNotReady(edit_id, edit.state)
    tensors = {}
    for value in session.scalars(select(EditValue).where(EditValue.edit_id == edit_id).order_by(EditValue.encoder)):
        if hashlib.sha256(value.delta + value.hidden).hexdigest() != value.sha256:
            raise BlobCorrupt(value.sha256)
        tensors[f"{value.encoder}.delta"] = numpy.frombuffer(value.delta, dtype="<f4")
        tensors[f"{value.encoder}.hidden"] = numpy.frombuffer(value.hidden, dtype="<f4")
    return save(tensors, metadata={"edit": str(edit_id)})


def cancel_edit(session: Session, *, edit_id: UUID, actor: str) -> EditOut:
    """A queued edit is cancelled at once; one at work is asked to stop. Cancelling twice changes nothing.

    Raises `EditHasEnded` for one that is ready or failed.
    """
    if session.get(Edit, edit_id) is None:
        raise EditNotFound(edit_id)
    job = latest_job(session, target_id=edit_id)
    edit = session.get_one(Edit, edit_id, with_for_update=True, populate_existing=True)
    if edit.state in ("ready", "failed"):
        raise EditHasEnded(edit_id, edit.state)
    if (was := edit.state) in ("queued", "optimizing"):
        if cancel(session, job):
            edit.state, edit.problem = "cancelled", CANCELLED
        else:
            edit.state = "cancelling"
        session.flush()
        record(
            session,
            actor=actor,
            action="edit.cancel",
            target=f"edit:{edit_id}",
            before={"state": was},
            after={"state": edit.state},
        )
    return get_edit(session, edit_id=edit_id)


def retry_edit(session: Session, *, edit_id: UUID, actor: str) -> EditOut:
    """Queue a failed or cancelled edit again; raises `EditNotRetryable` for any other."""
    edit = session.get(Edit, edit_id, with_for_update=True, populate_existing=True)
    if edit is None:
        raise EditNotFound(edit_id)
    if edit.state not in ("failed", "cancelled"):
        raise EditNotRetryable(edit_id, edit.state)
    before = {"state": edit.state, "problem": (edit.problem or {}).get("title")}
    edit.state, edit.problem = "queued", None
    session.flush()
    enqueue(session, kind=KIND, target_id=edit_id, actor=actor)
    after = {"state": edit.state, "problem": None}
    record(session, actor=actor, action="edit.retry", target=f"edit:{edit_id}", before=before, after=after)
    return get_edit(session, edit_id=edit_id)


def _checked_model(
    session: Session, *, name: str, edits: Mapping[str, EditCreate], store: Store, folder: Path
) -> Model:
    model = find_model(session, name=name)
    if model is None:
        raise ModelNotFound(name)
    if model.state != "ready":
        raise ModelNotReady(name, model.state)
    tokenizers = tokenizers_of(session, model_id=model.id, store=store, folder=folder)
    check(session, model=model, edits=edits, tokenizers=tokenizers)
    return model


def _insert(session: Session, *, model: Model, edits: Sequence[EditCreate], actor: str) -> Sequence[Row[Any]]:
    """The rows in the order of the edits."""
    rows = [
        {
            "id": uuid7(),
            "model_id": model.id,
            "source": edit.source,
            "destination": _kept(edit),
            "templates": edit.templates,
            "settings": edit.settings.model_dump(),
            "reason": edit.reason,
            "labels": edit.labels,
            "created_by": actor,
        }
        for edit in edits
    ]
    table = cast(Table, Edit.__table__)
    return session.execute(insert(table).returning(*table.columns, sort_by_parameter_order=True), rows).all()


def _kept(edit: EditCreate) -> dict[str, object]:
    return edit.destination.model_dump(exclude_none=True)
