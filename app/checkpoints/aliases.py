"""Names that compare-and-swap moves from checkpoint to checkpoint. A rollback is such a move.

The ETag of an alias counts its moves, deletions included, so no two states of it share an ETag.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time

from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.errors import AliasMoved, AliasNotFound, PreconditionRequired
from app.db.models import Alias, AliasMove, Checkpoint, Model
from app.db.pagination import PageCursor
from app.models.queries import get_model
from app.problems import Unprocessable
from emender.schemas.checkpoints import AliasOut, AliasPeriod
from emender.schemas.common import Page


@dataclass(frozen=True)
class Precondition:
    """The `If-Match` and `If-None-Match` headers of the request (RFC 9110, section 13.1)."""

    if_match: str | None = None
    if_none_match: str | None = None


def read_alias(session: Session, *, model_name: str, name: str) -> tuple[AliasOut, str]:
    """Return the alias and its ETag."""
    model = get_model(session, name=model_name)
    row = queries.find_alias(session, model_id=model.id, name=name)
    if row is None:
        raise _alias_not_found(model, name)
    return _alias_out(row), _etag(row)


def list_aliases(session: Session, *, model_name: str) -> list[AliasOut]:
    model = get_model(session, name=model_name)
    return [_alias_out(row) for row in queries.list_aliases(session, model_id=model.id)]


def read_history(
    session: Session, *, model_name: str, name: str, at: date | datetime | None, page: PageCursor[int]
) -> Page[AliasPeriod]:
    """Return where the alias pointed and for how long, newest first.

    With `at`, only the period that includes this time, or the periods that touch this day in UTC.
    """
    model = get_model(session, name=model_name)
    if at is None or isinstance(at, datetime):
        start = end = at
    else:
        start, end = datetime.combine(at, time.min, UTC), datetime.combine(at, time.max, UTC)
    query = queries.select_alias_periods(model_id=model.id, name=name, start=start, end=end)
    rows = session.execute(page.select(query, AliasMove.id)).all()
    if not rows and queries.count_alias_moves(session, model_id=model.id, name=name) == 0:
        raise _alias_not_found(model, name)
    rows, next_cursor = page.split(rows, keys=[move.id for move, _, _ in rows])
    periods = [
        AliasPeriod(
            version=checkpoint.version if checkpoint else None,
            commit=checkpoint.commit if checkpoint else None,
            since=move.moved_at,
            until=until,
            moved_by=move.moved_by,
        )
        for move, until, checkpoint in rows
    ]
    return Page(items=periods, next=next_cursor)


def move_alias(
    session: Session,
    *,
    model_name: str,
    name: str,
    version: str,
    precondition: Precondition,
    actor: str,
    reason: str | None = None,
) -> tuple[AliasOut, str, bool]:
    """Point the alias at a published checkpoint. Returns it, its ETag, and whether it was created.

    Moving an existing alias needs `If-Match`. Raises `AliasMoved`, `PreconditionRequired`, or the problem of the
    checkpoint.
    """
    model = get_model(session, name=model_name, lock=True)  # serializes requests that create the same alias
    row = queries.find_alias(session, model_id=model.id, name=name, lock=True)
    _check_precondition(row, name=name, precondition=precondition)
    checkpoint = queries.find_checkpoint(session, model=model, revision=version)
    if checkpoint is None:
        raise Unprocessable.at("/version", f"The model {model.name!r} has no version {version}.")
    queries.require_published(checkpoint)
    moved = _point(session, name=name, row=row, checkpoint=checkpoint, actor=actor, reason=reason)
    return _alias_out(moved), _etag(moved), row is None


def delete_alias(session: Session, *, model_name: str, name: str, precondition: Precondition, actor: str) -> None:
    """Remove the alias, under the same preconditions as a move."""
    model = get_model(session, name=model_name)
    row = queries.find_alias(session, model_id=model.id, name=name, lock=True)
    if row is None and precondition.if_match is None:
        raise _alias_not_found(model, name)
    _check_precondition(row, name=name, precondition=precondition)
    assert row is not None
    _record_move(session, name=name, before=row.checkpoint, after=None, actor=actor)
    session.delete(row)


def move_requested_alias(session: Session, *, checkpoint: Checkpoint) -> str | None:
    """Move the alias that apply named to its published checkpoint, unless it was moved since.

    Returns why it was not moved, or None.
    """
    name, actor = checkpoint.alias, checkpoint.created_by
    assert name is not None
    model = get_model(session, name=checkpoint.model.name, lock=True)
    row = queries.find_alias(session, model_id=model.id, name=name, lock=True)
    moves = row.moves if row else queries.count_alias_moves(session, model_id=model.id, name=name)
    if moves != checkpoint.alias_moves:
        where = f"points at {row.checkpoint.version}" if row else "was deleted"
        return f"The alias was moved while {checkpoint.version} was being built: it {where}."
    _point(session, name=name, row=row, checkpoint=checkpoint, actor=actor, reason=checkpoint.notes)
    return None


def _alias_not_found(model: Model, name: str) -> AliasNotFound:
    where = f"GET /v1/models/{model.name}/aliases lists them"
    return AliasNotFound(f"The model {model.name!r} has no alias {name!r}; {where}.")


def _alias_out(row: Alias) -> AliasOut:
    version, commit = row.checkpoint.version, row.checkpoint.commit
    return AliasOut(name=row.name, version=version, commit=commit, updated_at=row.updated_at)


def _etag(row: Alias) -> str:
    return f'"{row.moves}"'


def _point(
    session: Session, *, name: str, row: Alias | None, checkpoint: Checkpoint, actor: str, reason: str | None
) -> Alias:
    before = row.checkpoint if row else None
    if row is None:
        moves = queries.count_alias_moves(session, model_id=checkpoint.model_id, name=name)
        row = Alias(model_id=checkpoint.model_id, name=name, moves=moves)
        session.add(row)
    row.checkpoint_id = checkpoint.id
    row.moves += 1
    _record_move(session, name=name, before=before, after=checkpoint, actor=actor, reason=reason)
    session.refresh(row)
    return row


def _record_move(
    session: Session,
    *,
    name: str,
    before: Checkpoint | None,
    after: Checkpoint | None,
    actor: str,
    reason: str | None = None,
) -> None:
    """Add a move, or the deletion of an alias, to its history and to the audit log."""
    checkpoint = after or before
    assert checkpoint is not None
    model = checkpoint.model
    move = AliasMove(model_id=model.id, name=name, moved_by=actor)
    move.from_checkpoint_id, move.to_checkpoint_id = (side.id if side else None for side in (before, after))
    session.add(move)
    old, new = (side.version if side else None for side in (before, after))
    record(
        session,
        actor=actor,
        action="alias.move" if after else "alias.delete",
        target=f"alias:{model.name}/{name}",
        details={"alias": name, "from": old, "to": new},
        before={"version": old} if old else None,
        after={"version": new} if new else None,
        reason=reason,
    )


def _check_precondition(row: Alias | None, *, name: str, precondition: Precondition) -> None:
    if row is None:
        if precondition.if_match is not None:
            raise AliasMoved(f"The alias {name!r} does not exist; it may have been deleted.")
        return
    etag = _etag(row)
    now, headers = f"It points at {row.checkpoint.version}; its ETag is {etag}.", {"ETag": etag}
    if _matches(precondition.if_none_match, etag):
        raise AliasMoved(f"The alias {name!r} exists. {now}", headers=headers)
    if precondition.if_match is None:
        raise PreconditionRequired(
            f"The alias {name!r} exists. Send its ETag in If-Match, so that no other move is overwritten. {now}",
            headers=headers,
        )
    if not _matches(precondition.if_match, etag):
        raise AliasMoved(f"The alias {name!r} was moved. {now}", headers=headers)


def _matches(header: str | None, etag: str) -> bool:
    tags = [tag.strip() for tag in (header or "").split(",")]
    return "*" in tags or etag in tags
