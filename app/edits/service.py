"""Create, list, cancel and retry edits."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import insert, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.audit.service import record
from app.db.models import Edit, EditValue
from app.db.pagination import PageCursor
from app.edits import queries
from app.edits.errors import EditAlreadyFinished, EditNotFound, EditNotReady, EditNotRetryable
from app.edits.validation import check_edits
from app.jobs.enqueue import enqueue, enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT
from app.jobs.queries import cancel, latest_job
from app.jobs.states import CANCELLED
from app.models.queries import find_model, get_ready_model
from app.models.tokenizers import tokenizers_of
from app.storage.store import BlobCorrupt, Store
from editing.families.registry import FAMILIES
from emender.schemas.common import Page
from emender.schemas.edits import EditBatchOut, EditCreate, EditOut, EditRef, Losses

WRITTEN = {"source", "templates", "reason", "labels"}
"""The fields of a request that are columns of the edit as they are."""


def create_edit(session: Session, *, model: str, edit: EditCreate, store: Store, folder: Path, actor: str) -> EditOut:
    """Check an edit against its model and queue it. `folder` is the service's data directory.

    Raises `ModelNotFound`, `ModelNotReady`, or `Unprocessable` with the invalid field.
    """
    found = get_ready_model(session, name=model)
    tokenizers = tokenizers_of(session, model_id=found.id, store=store, folder=folder)
    check_edits(session, model=found, edits={"": edit}, tokenizers=tokenizers)
    columns = {
        **edit.model_dump(include=WRITTEN),
        "settings": FAMILIES[found.family or ""].complete_sampling(edit.settings.model_dump()),
        "destination": edit.destination.model_dump(exclude_none=True),
        **{"id": uuid7(), "model_id": found.id, "state": "queued", "created_by": actor},
    }
    row = Edit(**columns)
    session.add(row)
    enqueue(session, kind=OPTIMIZE_EDIT, target_id=row.id, actor=actor)
    details = {"model": found.name, "source": row.source, "destination": row.destination, "reason": row.reason}
    target, after = f"edit:{row.id}", {"state": "queued"}
    record(session, actor=actor, action="edit.create", target=target, details=details, after=after, reason=row.reason)
    new: dict[str, Any] = {"progress": None, "attempt": 0, "problem": None, "value": None}
    return EditOut(**columns, **new, model=found.name, created_at=row.created_at, updated_at=row.updated_at)


def create_edits(
    session: Session, *, model: str, edits: Sequence[EditCreate], store: Store, folder: Path, actor: str
) -> EditBatchOut:
    """Check many edits and queue them, all or none. One audit event names them all.

    Edits may have the same source: an apply chooses which of them it writes, and reports conflicts.
    """
    found = get_ready_model(session, name=model)
    tokenizers = tokenizers_of(session, model_id=found.id, store=store, folder=folder)
    check_edits(session, model=found, edits={f"/{n}": edit for n, edit in enumerate(edits)}, tokenizers=tokenizers)
    family = FAMILIES[found.family or ""]
    rows = [
        {
            **edit.model_dump(include=WRITTEN),
            "settings": family.complete_sampling(edit.settings.model_dump()),
            "destination": edit.destination.model_dump(exclude_none=True),
            **{"id": uuid7(), "model_id": found.id, "state": "queued", "created_by": actor},
        }
        for edit in edits
    ]
    session.execute(insert(Edit), rows)
    enqueue_many(session, kind=OPTIMIZE_EDIT, target_ids=[row["id"] for row in rows], actor=actor)
    details = {"count": len(rows), "edits": [str(row["id"]) for row in rows]}
    reasons = {edit.reason for edit in edits}
    reason = reasons.pop() if len(reasons) == 1 else None  # otherwise each edit has its own
    target = f"model:{found.name}"
    record(session, actor=actor, action="edit.create_batch", target=target, details=details, reason=reason)
    return EditBatchOut(count=len(rows), edits=[EditRef(id=row["id"], source=row["source"]) for row in rows])


def list_edits(
    session: Session,
    *,
    page: PageCursor[UUID],
    model: str | None = None,
    state: str | None = None,
    source: str | None = None,
    source_part: str | None = None,
    created_by: str | None = None,
) -> Page[EditOut]:
    """List edits, newest first. `source` matches exactly, `source_part` any part in upper or lower case."""
    model_id = None
    if model is not None:  # with the id, Postgres can estimate the number of its edits and choose the index
        if (found := find_model(session, name=model)) is None:
            return Page(items=[], next=None)
        model_id = found.id
    query = queries.filtered(
        model_id=model_id, state=state, source=source, source_part=source_part, created_by=created_by
    )
    rows, next_cursor = page.fetch(session, query, Edit.id)
    return Page(items=queries.describe(session, rows), next=next_cursor)


def get_edit(session: Session, *, edit_id: UUID) -> EditOut:
    return queries.describe(session, [find_edit(session, edit_id=edit_id)])[0]


def find_edit(session: Session, *, edit_id: UUID, lock: bool = False) -> Edit:
    """Return the edit as it is now. Raises `EditNotFound`."""
    edit = session.get(Edit, edit_id, with_for_update=lock, populate_existing=True)
    if edit is None:
        raise EditNotFound(f"There is no edit {edit_id}.")
    return edit


def losses(session: Session, *, edit_id: UUID) -> Losses:
    """Return the losses of each step of stage I. They are empty until the edit is ready."""
    found = session.scalar(select(EditValue.losses).where(EditValue.edit_id == edit_id)) or {}
    return Losses(text=found.get("text", []), noise=found.get("noise", []))


def value_file(session: Session, *, edit_id: UUID) -> bytes:
    """Return the value as it is stored, a safetensors file: `<encoder>.delta` and `<encoder>.hidden`, float32 (width,).

    δ is what is added to the encoder's state after the value's layer, h that state before any edit. Raises
    `EditNotReady`, and `BlobCorrupt` if the file does not have the sha256 that was stored with it.
    """
    edit = find_edit(session, edit_id=edit_id)
    if edit.state != "ready":
        raise EditNotReady(f"The edit {edit_id} is {edit.state}; it has a value once it is ready.")
    value = session.get_one(EditValue, edit_id)
    if hashlib.sha256(value.content).hexdigest() != value.sha256:
        raise BlobCorrupt(value.sha256)
    return value.content


def cancel_edit(session: Session, *, edit_id: UUID, actor: str) -> EditOut:
    """Cancel a queued edit at once, and a running one at its next step. Cancelling it again changes nothing.

    Raises `EditAlreadyFinished` if it is ready or failed.
    """
    find_edit(session, edit_id=edit_id)
    job = latest_job(session, target_id=edit_id)
    edit = find_edit(session, edit_id=edit_id, lock=True)
    if edit.state in ("ready", "failed"):
        raise EditAlreadyFinished(f"The edit {edit_id} is {edit.state}, so it cannot be cancelled.")
    if edit.state in ("queued", "optimizing"):
        before = {"state": edit.state}
        if cancel(session, job):
            edit.state, edit.problem = "cancelled", CANCELLED
        else:
            edit.state = "cancelling"
        session.flush()
        after = {"state": edit.state}
        record(session, actor=actor, action="edit.cancel", target=f"edit:{edit_id}", before=before, after=after)
    return get_edit(session, edit_id=edit_id)


def retry_edit(session: Session, *, edit_id: UUID, actor: str) -> EditOut:
    """Queue a failed or cancelled edit again. Raises `EditNotRetryable` for others."""
    edit = find_edit(session, edit_id=edit_id, lock=True)
    if edit.state not in ("failed", "cancelled"):
        detail = f"The edit {edit_id} is {edit.state}; only a failed or cancelled edit can be retried."
        raise EditNotRetryable(detail)
    before = {"state": edit.state, "problem": (edit.problem or {}).get("title")}
    edit.state, edit.problem = "queued", None
    session.flush()
    enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit_id, actor=actor)
    after = {"state": edit.state, "problem": None}
    record(session, actor=actor, action="edit.retry", target=f"edit:{edit_id}", before=before, after=after)
    return get_edit(session, edit_id=edit_id)
