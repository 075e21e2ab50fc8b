"""Ask for edits, follow them, cancel and retry them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.audit.service import record, record_all
from app.db.models import AuditEvent, Edit, EditValue, Model
from app.db.pagination import PageCursor
from app.db.rows import insert_rows
from app.edits import queries
from app.edits.errors import EditAlreadyFinished, EditNotFound, EditNotReady, EditNotRetryable
from app.edits.validation import check
from app.jobs.enqueue import enqueue, enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT
from app.jobs.queries import cancel, latest_job, work_status
from app.jobs.states import CANCELLED
from app.models.queries import find_model, get_ready_model
from app.models.tokenizers import tokenizers_of
from app.problems import Problem
from app.storage.store import BlobCorrupt, BlobMissing, Store
from editing.prompts import PromptTokenizer
from emender.schemas.common import Page, WorkStatus
from emender.schemas.edits import EditBatchOut, EditCreate, EditOut, EditRef, Losses


@dataclass(frozen=True)
class Asked:
    """An edit that a request asks for; `origin` is what audit events say of the request."""

    model: str
    edit: EditCreate
    actor: str
    origin: Mapping[str, str | None]


def create_edit(session: Session, *, model: str, edit: EditCreate, store: Store, folder: Path, actor: str) -> EditOut:
    """Check the edit against the model and queue it. `folder` is the service's, where tokenizers are laid out.

    Raises `ModelNotFound`, `ModelNotReady`, or `Unprocessable` naming the field.
    """
    origin = {name: session.info.get(name) for name in ("request_id", "address")}
    asked = Asked(model, edit, actor, origin)
    (created,) = create_each(session, asked=[asked], store=store, folder=folder)
    if isinstance(created, Exception):
        raise created
    return created


def create_each(
    session: Session, *, asked: Sequence[Asked], store: Store, folder: Path
) -> Sequence[EditOut | Exception]:
    """The same for edits of different requests, by the statements of one; each is queued, or refused, for itself."""
    editable = cache(partial(_editable, session, store=store, folder=folder))
    taken: list[tuple[Asked, Model]] = []
    refused: dict[int, Exception] = {}
    for place, each in enumerate(asked):
        try:
            model, tokenizers = editable(each.model)
            check(session, model=model, edits={"": each.edit}, tokenizers=tokenizers)
            taken.append((each, model))
        except (Problem, BlobCorrupt, BlobMissing, OSError) as refusal:
            refused[place] = refusal
    created = iter(_create(session, taken))
    return [refused[place] if place in refused else next(created) for place in range(len(asked))]


def _create(session: Session, taken: Sequence[tuple[Asked, Model]]) -> Sequence[EditOut]:
    if not taken:
        return []
    rows = [_row(each.edit, model=model, actor=each.actor) for each, model in taken]
    created_at = _insert(session, rows)
    enqueue_many(session, kind=OPTIMIZE_EDIT, targets=[(row["id"], row["created_by"]) for row in rows])
    events = []
    for (each, model), row in zip(taken, rows, strict=True):
        told = {name: row[name] for name in ("source", "destination", "reason")}
        event = AuditEvent(actor=each.actor, action="edit.create", target=f"edit:{row['id']}", **each.origin)
        event.details, event.after, event.reason = {"model": model.name, **told}, {"state": "queued"}, row["reason"]
        events.append(event)
    record_all(session, events)
    return [queries.queued(row, model=model, at=created_at) for (_, model), row in zip(taken, rows, strict=True)]


def create_edits(
    session: Session, *, model: str, edits: Sequence[EditCreate], store: Store, folder: Path, actor: str
) -> EditBatchOut:
    """The same for many, all or none; one audit event names them all.

    Two edits of one source in a batch are taken, as they are from two requests: which of them an apply writes is
    chosen there, and it reports the conflict.
    """
    by_pointer = {f"/{index}": edit for index, edit in enumerate(edits)}
    row, tokenizers = _editable(session, model, store=store, folder=folder)
    check(session, model=row, edits=by_pointer, tokenizers=tokenizers)
    rows = [_row(edit, model=row, actor=actor) for edit in edits]
    _insert(session, rows)
    ids = [edit["id"] for edit in rows]
    enqueue_many(session, kind=OPTIMIZE_EDIT, targets=[(edit_id, actor) for edit_id in ids])
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
    page: PageCursor[UUID],
    model: str | None = None,
    state: str | None = None,
    source: str | None = None,
    source_part: str | None = None,
    created_by: str | None = None,
) -> Page[EditOut]:
    """Newest first. `source` is one whole, `source_part` some of it in whatever case."""
    model_id = None
    if model is not None:  # by its id Postgres knows how many edits it has, and so how to find the newest
        if (found := find_model(session, name=model)) is None:
            return Page(items=[], next=None)
        model_id = found.id
    query = queries.filtered(
        model_id=model_id, state=state, source=source, source_part=source_part, created_by=created_by
    )
    rows, next_cursor = page.fetch(session, query, Edit.id)
    return Page(items=queries.describe(session, rows), next=next_cursor)


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


def losses(session: Session, *, edit_id: UUID) -> Losses:
    """Return the losses of each step of stage I. They are empty until the edit is ready."""
    found = session.scalar(select(EditValue.losses).where(EditValue.edit_id == edit_id)) or {}
    return Losses(text=found.get("text", []), noise=found.get("noise", []))


def value_file(session: Session, *, edit_id: UUID) -> bytes:
    """Return the value as it is stored, a safetensors file: `<encoder>.delta` and `<encoder>.hidden`, float32 (width,).

    δ is what is added to the encoder's state after the value's layer, h that state before any edit. Raises
    `EditNotReady`, and `BlobCorrupt` if the file does not have the sha256 that was stored with it.
    """
    edit = session.get(Edit, edit_id)
    if edit is None:
        raise EditNotFound(edit_id)
    if edit.state != "ready":
        raise EditNotReady(edit_id, edit.state)
    value = session.get_one(EditValue, edit_id)
    if hashlib.sha256(value.content).hexdigest() != value.sha256:
        raise BlobCorrupt(value.sha256)
    return value.content


def cancel_edit(session: Session, *, edit_id: UUID, actor: str) -> EditOut:
    """A queued edit is cancelled at once; one at work is asked to stop. Cancelling twice changes nothing.

    Raises `EditAlreadyFinished` for one that is ready or failed.
    """
    if session.get(Edit, edit_id) is None:
        raise EditNotFound(edit_id)
    job = latest_job(session, target_id=edit_id)
    edit = session.get_one(Edit, edit_id, with_for_update=True, populate_existing=True)
    if edit.state in ("ready", "failed"):
        raise EditAlreadyFinished(edit_id, edit.state)
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
    enqueue(session, kind=OPTIMIZE_EDIT, target_id=edit_id, actor=actor)
    after = {"state": edit.state, "problem": None}
    record(session, actor=actor, action="edit.retry", target=f"edit:{edit_id}", before=before, after=after)
    return get_edit(session, edit_id=edit_id)


def _editable(session: Session, name: str, *, store: Store, folder: Path) -> tuple[Model, Sequence[PromptTokenizer]]:
    model = get_ready_model(session, name=name)
    return model, tokenizers_of(session, model_id=model.id, store=store, folder=folder)


def _row(edit: EditCreate, *, model: Model, actor: str) -> dict[str, Any]:
    return {
        "id": uuid7(),
        "model_id": model.id,
        "source": edit.source,
        "destination": edit.destination.model_dump(exclude_none=True),
        "templates": edit.templates,
        "settings": edit.settings.model_dump(),
        "reason": edit.reason,
        "labels": edit.labels,
        "state": "queued",
        "created_by": actor,
    }


def _insert(session: Session, rows: Sequence[dict[str, Any]]) -> datetime:
    """Add the rows; returns when they were created, which is one moment for all."""
    return cast(datetime, insert_rows(session, Edit, rows, returning="created_at").scalar())
