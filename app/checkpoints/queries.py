"""What the checkpoint calls read from the database."""

import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import Select, func, or_, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session, selectinload

from app.db.models import (
    Alias,
    AliasMove,
    Checkpoint,
    CheckpointEdit,
    CheckpointFile,
    Edit,
    EditValue,
    Evaluation,
    JsonObject,
    Model,
    ModelFile,
    Statistics,
)


def model_by_name(session: Session, *, name: str, lock: bool = False) -> Model | None:
    """The model of that name; with `lock`, nobody else numbers a checkpoint of it until the transaction ends."""
    query = select(Model).where(Model.name == name)
    if lock:
        query = query.with_for_update(key_share=True)
    return session.scalars(query).one_or_none()


MAIN = "main"
PRODUCTION = "production"
VERSION = re.compile(r"v[1-9][0-9]{0,8}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def checkpoint_at(session: Session, *, model_id: UUID, revision: str) -> Checkpoint | None:
    """By version, commit or alias. `main`, which the Hub's clients ask for by default, is what the alias `production`
    points at; without such an alias, the newest published version."""
    if VERSION.fullmatch(revision):
        return checkpoint_by_number(session, model_id=model_id, number=int(revision[1:]))
    if COMMIT.fullmatch(revision):
        return checkpoint_by_commit(session, model_id=model_id, commit=revision)
    found = alias(session, model_id=model_id, name=PRODUCTION if revision == MAIN else revision)
    if found is None and revision == MAIN:
        return newest_published(session, model_id=model_id)
    return found.checkpoint if found else None


def checkpoint_by_number(session: Session, *, model_id: UUID, number: int) -> Checkpoint | None:
    return session.scalars(
        select(Checkpoint).where(Checkpoint.model_id == model_id, Checkpoint.number == number)
    ).one_or_none()


def checkpoint_by_commit(session: Session, *, model_id: UUID, commit: str) -> Checkpoint | None:
    """Equal inputs give equal commits: of several, one that is served, the newest."""
    return session.scalars(
        select(Checkpoint)
        .where(Checkpoint.model_id == model_id, Checkpoint.commit == commit)
        .order_by(Checkpoint.state, Checkpoint.number.desc())  # "published" sorts before "retracted"
        .limit(1)
    ).one_or_none()


def newest_published(session: Session, *, model_id: UUID) -> Checkpoint | None:
    return session.scalars(
        select(Checkpoint)
        .where(Checkpoint.model_id == model_id, Checkpoint.state == "published")
        .order_by(Checkpoint.number.desc())
        .limit(1)
    ).one_or_none()


def newest_of_each_model(session: Session) -> Sequence[Checkpoint]:
    """The newest published version of each model that has one."""
    query = select(Checkpoint).where(Checkpoint.state == "published")
    query = query.order_by(Checkpoint.model_id, Checkpoint.number.desc()).ext(distinct_on(Checkpoint.model_id))
    return session.scalars(query.options(selectinload(Checkpoint.model))).all()


def checkpoints_of(model_id: UUID) -> Select[Checkpoint]:
    return select(Checkpoint).where(Checkpoint.model_id == model_id)


def last_number(session: Session, *, model_id: UUID) -> int:
    return session.scalar(select(func.max(Checkpoint.number)).where(Checkpoint.model_id == model_id)) or 0


def numbers(session: Session, *, ids: Collection[UUID]) -> dict[UUID, int]:
    query = select(Checkpoint.id, Checkpoint.number).where(Checkpoint.id.in_(ids))
    return dict(session.execute(query).all())


def alias(session: Session, *, model_id: UUID, name: str, lock: bool = False) -> Alias | None:
    return session.get(Alias, (model_id, name), with_for_update=lock, populate_existing=lock)


def alias_moves(session: Session, *, model_id: UUID, name: str) -> int:
    """How often the alias was ever moved, its deletions counted."""
    query = select(func.count()).where(AliasMove.model_id == model_id, AliasMove.name == name)
    return session.scalar(query) or 0


def alias_periods(
    *, model_id: UUID, name: str, start: datetime | None, end: datetime | None
) -> Select[AliasMove, datetime | None]:
    """The alias's moves, each with the moment of the next; of those the ones that held at any time between `start` and
    `end`, where these are given."""
    following = func.lead(AliasMove.moved_at).over(order_by=AliasMove.id).label("until")
    moves = select(AliasMove.id, following).where(AliasMove.model_id == model_id, AliasMove.name == name).subquery()
    query = select(AliasMove, moves.c.until).join(moves, moves.c.id == AliasMove.id)
    if start is not None:
        query = query.where(or_(moves.c.until.is_(None), moves.c.until > start))
    if end is not None:
        query = query.where(AliasMove.moved_at <= end)
    return query


def checkpoints_by_id(session: Session, *, ids: Collection[UUID]) -> dict[UUID, Checkpoint]:
    return {row.id: row for row in session.scalars(select(Checkpoint).where(Checkpoint.id.in_(ids)))}


def aliases_of(session: Session, *, model_id: UUID) -> Sequence[Alias]:
    query = select(Alias).where(Alias.model_id == model_id).options(selectinload(Alias.checkpoint)).order_by(Alias.name)
    return session.scalars(query).all()


def alias_names(session: Session, *, checkpoint_ids: Collection[UUID]) -> dict[UUID, list[str]]:
    names: dict[UUID, list[str]] = {checkpoint_id: [] for checkpoint_id in checkpoint_ids}
    query = select(Alias.checkpoint_id, Alias.name).where(Alias.checkpoint_id.in_(checkpoint_ids)).order_by(Alias.name)
    for checkpoint_id, name in session.execute(query):
        names[checkpoint_id].append(name)
    return names


def edit_counts(session: Session, *, checkpoint_ids: Collection[UUID]) -> dict[UUID, int]:
    query = (
        select(CheckpointEdit.checkpoint_id, func.count())
        .where(CheckpointEdit.checkpoint_id.in_(checkpoint_ids))
        .group_by(CheckpointEdit.checkpoint_id)
    )
    return dict(session.execute(query).all())


def edits_in(session: Session, *, checkpoint_id: UUID, with_values: bool = False) -> Sequence[Edit]:
    """The edits of a checkpoint, in their order; their values, 6 KB each, only when asked for."""
    query = (
        select(Edit)
        .join(CheckpointEdit, CheckpointEdit.edit_id == Edit.id)
        .where(CheckpointEdit.checkpoint_id == checkpoint_id)
        .order_by(CheckpointEdit.position)
    )
    if with_values:
        query = query.options(selectinload(Edit.values))
    return session.scalars(query).all()


def latest_judgement(session: Session, *, checkpoint_id: UUID) -> JsonObject | None:
    """The newest report of a classifier on the checkpoint."""
    query = select(Evaluation.report).where(
        Evaluation.checkpoint_id == checkpoint_id,
        Evaluation.kind.in_(("check", "evaluation")),
        Evaluation.state == "ready",
    )
    return session.scalars(query.order_by(Evaluation.id.desc()).limit(1)).one_or_none()


def evaluations_of(checkpoint_id: UUID, *, kind: str | None = None) -> Select[Evaluation]:
    """What was drawn or measured of a checkpoint."""
    query = select(Evaluation).where(Evaluation.checkpoint_id == checkpoint_id)
    return query.where(Evaluation.kind == kind) if kind else query


def methods_in(session: Session, *, checkpoint_id: UUID) -> dict[UUID, str]:
    """Where each edit of a checkpoint is written."""
    query = select(CheckpointEdit.edit_id, CheckpointEdit.method).where(CheckpointEdit.checkpoint_id == checkpoint_id)
    return dict(session.execute(query).all())


def edits_by_id(session: Session, *, ids: Iterable[UUID]) -> dict[UUID, Edit]:
    return {edit.id: edit for edit in session.scalars(select(Edit).where(Edit.id.in_(set(ids))))}


def value_layers(session: Session, *, ids: Iterable[UUID]) -> dict[UUID, dict[str, int]]:
    """The layer that each edit's value was optimised for, by text encoder."""
    query = select(EditValue.edit_id, EditValue.encoder, EditValue.layer).where(EditValue.edit_id.in_(set(ids)))
    layers: dict[UUID, dict[str, int]] = {}
    for edit_id, encoder, layer in session.execute(query.order_by(EditValue.edit_id, EditValue.encoder)):
        layers.setdefault(edit_id, {})[encoder] = layer
    return layers


def ready_edits(session: Session, *, model_id: UUID) -> Sequence[Edit]:
    """Oldest first."""
    query = select(Edit).where(Edit.model_id == model_id, Edit.state == "ready").order_by(Edit.id)
    return session.scalars(query).all()


def newest_statistics(session: Session, *, model_id: UUID, state: str | None = "ready") -> Statistics | None:
    query = select(Statistics).where(Statistics.model_id == model_id)
    if state is not None:
        query = query.where(Statistics.state == state)
    return session.scalars(query.order_by(Statistics.id.desc()).limit(1)).one_or_none()


def model_files(session: Session, *, model_id: UUID) -> Sequence[ModelFile]:
    return session.scalars(select(ModelFile).where(ModelFile.model_id == model_id).order_by(ModelFile.path)).all()


def checkpoint_files_like(session: Session, *, sha256: str, limit: int) -> Sequence[tuple[Checkpoint, CheckpointFile]]:
    """The checkpoint files with these bytes, of the newest checkpoint first."""
    query = (
        select(Checkpoint, CheckpointFile)
        .join(CheckpointFile, CheckpointFile.checkpoint_id == Checkpoint.id)
        .where(CheckpointFile.sha256 == sha256)
        .order_by(Checkpoint.id.desc(), CheckpointFile.path)
        .limit(limit)
        .options(selectinload(Checkpoint.model))
    )
    return [(checkpoint, file) for checkpoint, file in session.execute(query)]


def model_files_like(session: Session, *, sha256: str) -> Sequence[tuple[Model, ModelFile]]:
    query = (
        select(Model, ModelFile)
        .join(ModelFile, ModelFile.model_id == Model.id)
        .where(ModelFile.sha256 == sha256)
        .order_by(Model.id, ModelFile.path)
    )
    return [(model, file) for model, file in session.execute(query)]
