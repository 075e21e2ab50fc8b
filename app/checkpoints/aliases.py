"""Names that are moved from version to version by compare-and-swap; a rollback is one such move.

An alias's ETag counts its moves, also across a deletion, so that no two states of it ever share one.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from uuid import UUID

from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.errors import (
    AliasMoved,
    AliasNotFound,
    CheckpointNotPublished,
    CheckpointRetracted,
    PreconditionRequired,
)
from app.db.models import Alias, AliasMove, Checkpoint, Model
from app.db.pagination import PageCursor
from app.problems import Unprocessable
from emender.schemas.checkpoints import AliasOut, AliasPeriod
from emender.schemas.common import Page


@dataclass(frozen=True)
class Expectation:
    """What the caller knows of the alias: `If-Match` and `If-None-Match` as they were sent (RFC 9110, section 13.1)."""

    if_match: str | None = None
    if_none_match: str | None = None


def etag(moves: int) -> str:
    return f'"{moves}"'


def read_alias(session: Session, *, model: Model, name: str) -> tuple[AliasOut, str]:
    """The alias and its ETag."""
    row = queries.alias(session, model_id=model.id, name=name)
    if row is None:
        raise AliasNotFound(model.name, name)
    return alias_out(row), etag(row.moves)


def list_aliases(session: Session, *, model: Model) -> list[AliasOut]:
    return [alias_out(row) for row in queries.aliases_of(session, model_id=model.id)]


def read_history(
    session: Session, *, model: Model, name: str, at: date | datetime | None, page: PageCursor[int]
) -> Page[AliasPeriod]:
    """Where the alias pointed and for how long, newest first.

    `at` leaves the one period that holds at a moment, or those that touch a day in UTC.
    """
    start, end = _span(at)
    query = queries.alias_periods(model_id=model.id, name=name, start=start, end=end)
    rows = session.execute(page.select(query, AliasMove.id)).all()
    if not rows and queries.alias_moves(session, model_id=model.id, name=name) == 0:
        raise AliasNotFound(model.name, name)
    rows, next_cursor = page.split(rows, keys=[move.id for move, _ in rows])
    ids = {move.to_checkpoint_id for move, _ in rows if move.to_checkpoint_id}
    checkpoints = queries.checkpoints_by_id(session, ids=ids)
    periods = []
    for move, until in rows:
        checkpoint = checkpoints[move.to_checkpoint_id] if move.to_checkpoint_id else None
        periods.append(
            AliasPeriod(
                version=f"v{checkpoint.number}" if checkpoint else None,
                commit=checkpoint.commit if checkpoint else None,
                since=move.moved_at,
                until=until,
                moved_by=move.moved_by,
            )
        )
    return Page(items=periods, next=next_cursor)


def move_alias(
    session: Session,
    *,
    model: Model,
    name: str,
    version: str,
    expected: Expectation,
    actor: str,
    reason: str | None = None,
) -> tuple[AliasOut, str, bool]:
    """Point the alias at a published version; also says whether it was created.

    Creating one needs no precondition; moving one needs `If-Match`. Raises `AliasMoved` (412) where the alias is not
    as expected, `PreconditionRequired` (428), and what is wrong with the version.
    """
    queries.model_by_name(session, name=model.name, lock=True)  # two who create the same alias take turns
    row = queries.alias(session, model_id=model.id, name=name, lock=True)
    _check(row, name=name, expected=expected)
    checkpoint = queries.checkpoint_by_number(session, model_id=model.id, number=int(version[1:]))
    if checkpoint is None:
        raise Unprocessable.at("/version", f"The model {model.name!r} has no version {version}.")
    if checkpoint.state == "retracted":
        raise CheckpointRetracted(checkpoint)
    if checkpoint.state != "published":
        raise CheckpointNotPublished(checkpoint)
    moved = _point(session, model=model, name=name, row=row, checkpoint=checkpoint, actor=actor, reason=reason)
    return alias_out(moved), etag(moved.moves), row is None


def delete_alias(session: Session, *, model: Model, name: str, expected: Expectation, actor: str) -> None:
    """Remove the alias; the same preconditions as for moving it."""
    row = queries.alias(session, model_id=model.id, name=name, lock=True)
    if row is None and expected.if_match is None:
        raise AliasNotFound(model.name, name)
    _check(row, name=name, expected=expected)
    assert row is not None
    session.add(_move(model.id, name, from_id=row.checkpoint_id, to_id=None, actor=actor))
    session.delete(row)
    details = {"alias": name, "from": f"v{row.checkpoint.number}", "to": None}
    record(
        session,
        actor=actor,
        action="alias.delete",
        target=f"alias:{model.name}/{name}",
        details=details,
        before={"version": details["from"]},
    )


def move_if_unmoved(session: Session, *, model: Model, checkpoint: Checkpoint, actor: str) -> str | None:
    """At publication: move the alias that apply named, unless it moved since. None on success, else the reason."""
    name = checkpoint.alias
    assert name is not None
    queries.model_by_name(session, name=model.name, lock=True)
    row = queries.alias(session, model_id=model.id, name=name, lock=True)
    moves = row.moves if row else queries.alias_moves(session, model_id=model.id, name=name)
    if moves != checkpoint.alias_moves:
        where = f"points at v{row.checkpoint.number}" if row else "was deleted"
        return f"The alias was moved while v{checkpoint.number} was being built: it {where}."
    _point(session, model=model, name=name, row=row, checkpoint=checkpoint, actor=actor, reason=checkpoint.notes)
    return None


def alias_out(row: Alias) -> AliasOut:
    checkpoint = row.checkpoint
    return AliasOut(name=row.name, version=f"v{checkpoint.number}", commit=checkpoint.commit, updated_at=row.updated_at)


def _point(
    session: Session,
    *,
    model: Model,
    name: str,
    row: Alias | None,
    checkpoint: Checkpoint,
    actor: str,
    reason: str | None,
) -> Alias:
    before = row.checkpoint if row else None
    if row is None:
        moves = queries.alias_moves(session, model_id=model.id, name=name) + 1
        row = Alias(model_id=model.id, name=name, checkpoint_id=checkpoint.id, moves=moves)
        session.add(row)
    else:
        row.checkpoint_id = checkpoint.id
        row.moves += 1
    session.add(_move(model.id, name, from_id=before.id if before else None, to_id=checkpoint.id, actor=actor))
    details = {"alias": name, "from": f"v{before.number}" if before else None, "to": f"v{checkpoint.number}"}
    record(
        session,
        actor=actor,
        action="alias.move",
        target=f"alias:{model.name}/{name}",
        details=details,
        before={"version": details["from"]} if before else None,
        after={"version": details["to"]},
        reason=reason,
    )
    session.refresh(row)
    return row


def _move(model_id: UUID, name: str, *, from_id: UUID | None, to_id: UUID | None, actor: str) -> AliasMove:
    return AliasMove(model_id=model_id, name=name, from_checkpoint_id=from_id, to_checkpoint_id=to_id, moved_by=actor)


def _span(at: date | datetime | None) -> tuple[datetime | None, datetime | None]:
    """A moment as a span without length, a day as all of it; None as all time."""
    if at is None or isinstance(at, datetime):
        return at, at
    return datetime.combine(at, time.min, UTC), datetime.combine(at, time.max, UTC)


def _check(row: Alias | None, *, name: str, expected: Expectation) -> None:
    if expected.if_none_match is not None and row is not None and _matches(expected.if_none_match, row):
        raise AliasMoved(f"The alias {name!r} exists; it is {_where(row)}.", headers={"ETag": etag(row.moves)})
    if expected.if_match is None:
        if row is not None:
            raise PreconditionRequired(
                f"The alias {name!r} exists; send its ETag in If-Match, so that no move of others is lost. "
                f"It is {_where(row)}.",
                headers={"ETag": etag(row.moves)},
            )
    elif row is None:
        raise AliasMoved(f"The alias {name!r} does not exist (any more).")
    elif not _matches(expected.if_match, row):
        raise AliasMoved(f"The alias {name!r} was moved: it is {_where(row)}.", headers={"ETag": etag(row.moves)})


def _matches(header: str, row: Alias) -> bool:
    tags = [tag.strip() for tag in header.split(",")]
    return "*" in tags or etag(row.moves) in tags


def _where(row: Alias) -> str:
    return f"at v{row.checkpoint.number}, ETag {etag(row.moves)}"
