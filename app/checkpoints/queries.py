"""Find checkpoints, aliases and edits."""

import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import Select, func, or_, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session, selectinload

from app.checkpoints.errors import CheckpointNotFound, CheckpointNotPublished, CheckpointRetracted
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
)

MAIN = "main"
"""The revision that Hub clients ask for by default."""
PRODUCTION = "production"
VERSION = re.compile(r"v[1-9][0-9]{0,8}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def find_checkpoint(session: Session, *, model: Model, revision: str) -> Checkpoint | None:
    """Return the checkpoint that a version, a commit or an alias names.

    `main` is the alias `production`. Without that alias it is the newest published checkpoint. Equal inputs give equal
    commits; of several checkpoints with one commit, the newest that is served is returned.
    """
    query = select(Checkpoint).where(Checkpoint.model_id == model.id)
    if VERSION.fullmatch(revision):
        query = query.where(Checkpoint.number == int(revision[1:]))
    elif COMMIT.fullmatch(revision):  # "published" sorts before "retracted"
        query = query.where(Checkpoint.commit == revision).order_by(Checkpoint.state, Checkpoint.number.desc())
    else:
        alias = PRODUCTION if revision == MAIN else revision
        query = query.join(Alias, Alias.checkpoint_id == Checkpoint.id)
        query = query.where(Alias.model_id == model.id, Alias.name == alias)
    found = session.scalars(query.limit(1)).one_or_none()
    if found is None and revision == MAIN:
        newest = select(Checkpoint).where(Checkpoint.model_id == model.id, Checkpoint.state == "published")
        return session.scalars(newest.order_by(Checkpoint.number.desc()).limit(1)).one_or_none()
    return found


def get_checkpoint(session: Session, *, model: Model, revision: str) -> Checkpoint:
    """Return the checkpoint that a revision names. Raises `CheckpointNotFound`."""
    checkpoint = find_checkpoint(session, model=model, revision=revision)
    if checkpoint is None:
        raise CheckpointNotFound(
            f"The model {model.name!r} has no version, alias or commit {revision[:200]!r}; "
            f"GET /v1/models/{model.name}/checkpoints lists its checkpoints."
        )
    return checkpoint


def get_published_checkpoint(session: Session, *, model: Model, revision: str) -> Checkpoint:
    """Return a checkpoint that is served. Also raises `CheckpointRetracted` or `CheckpointNotPublished`."""
    checkpoint = get_checkpoint(session, model=model, revision=revision)
    require_published(checkpoint)
    return checkpoint


def require_published(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointRetracted` or `CheckpointNotPublished` if the checkpoint is not served."""
    if checkpoint.state == "retracted":
        reason = (checkpoint.problem or {}).get("detail", "")
        raise CheckpointRetracted(f"{checkpoint.version} was retracted and is no longer served. {reason}".strip())
    if checkpoint.state != "published":
        raise CheckpointNotPublished(
            f"{checkpoint.version} is {checkpoint.state}; only a published checkpoint is served."
        )


def newest_of_each_model(session: Session) -> Sequence[Checkpoint]:
    """Return the newest published checkpoint of each model that has one."""
    query = select(Checkpoint).where(Checkpoint.state == "published")
    query = query.order_by(Checkpoint.model_id, Checkpoint.number.desc()).ext(distinct_on(Checkpoint.model_id))
    return session.scalars(query.options(selectinload(Checkpoint.model))).all()


def select_checkpoints(model_id: UUID) -> Select[Checkpoint]:
    return select(Checkpoint).where(Checkpoint.model_id == model_id)


def checkpoints_by_id(session: Session, *, ids: Collection[UUID]) -> dict[UUID, Checkpoint]:
    return {row.id: row for row in session.scalars(select(Checkpoint).where(Checkpoint.id.in_(ids)))}


def last_number(session: Session, *, model_id: UUID) -> int:
    return session.scalar(select(func.max(Checkpoint.number)).where(Checkpoint.model_id == model_id)) or 0


def numbers(session: Session, *, ids: Collection[UUID]) -> dict[UUID, int]:
    query = select(Checkpoint.id, Checkpoint.number).where(Checkpoint.id.in_(ids))
    return dict(session.execute(query).all())


def find_alias(session: Session, *, model_id: UUID, name: str, lock: bool = False) -> Alias | None:
    return session.get(Alias, (model_id, name), with_for_update=lock, populate_existing=lock)


def list_aliases(session: Session, *, model_id: UUID) -> Sequence[Alias]:
    query = select(Alias).where(Alias.model_id == model_id).options(selectinload(Alias.checkpoint)).order_by(Alias.name)
    return session.scalars(query).all()


def count_alias_moves(session: Session, *, model_id: UUID, name: str) -> int:
    """Return how often the alias was moved since it first existed, deletions included."""
    query = select(func.count()).where(AliasMove.model_id == model_id, AliasMove.name == name)
    return session.scalar(query) or 0


def select_alias_periods(
    *, model_id: UUID, name: str, start: datetime | None, end: datetime | None
) -> Select[AliasMove, datetime | None, Checkpoint | None]:
    """Select the moves of an alias, each with the time of the next move and the checkpoint that it points at since.

    With `start` and `end`, only the moves that were in effect at some time between them.
    """
    next_move = func.lead(AliasMove.moved_at).over(order_by=AliasMove.id).label("until")
    moves = select(AliasMove.id, next_move).where(AliasMove.model_id == model_id, AliasMove.name == name).subquery()
    query = select(AliasMove, moves.c.until, Checkpoint).join(moves, moves.c.id == AliasMove.id)
    query = query.outerjoin(Checkpoint, Checkpoint.id == AliasMove.to_checkpoint_id)
    if start is not None:
        query = query.where(or_(moves.c.until.is_(None), moves.c.until > start))
    if end is not None:
        query = query.where(AliasMove.moved_at <= end)
    return query


def alias_names(session: Session, *, checkpoint_ids: Collection[UUID]) -> dict[UUID, list[str]]:
    """Return the names of the aliases that point at each checkpoint."""
    names: dict[UUID, list[str]] = {checkpoint_id: [] for checkpoint_id in checkpoint_ids}
    query = select(Alias.checkpoint_id, Alias.name).where(Alias.checkpoint_id.in_(checkpoint_ids)).order_by(Alias.name)
    for checkpoint_id, name in session.execute(query):
        names[checkpoint_id].append(name)
    return names


def edit_counts(session: Session, *, checkpoint_ids: Collection[UUID]) -> dict[UUID, int]:
    query = select(CheckpointEdit.checkpoint_id, func.count()).group_by(CheckpointEdit.checkpoint_id)
    return dict(session.execute(query.where(CheckpointEdit.checkpoint_id.in_(checkpoint_ids))).all())


def list_edits(session: Session, *, checkpoint_id: UUID, with_values: bool = False) -> Sequence[Edit]:
    """Return the edits of a checkpoint in their order; their values, 6 KB each, only if asked for."""
    query = select(Edit).join(CheckpointEdit, CheckpointEdit.edit_id == Edit.id)
    query = query.where(CheckpointEdit.checkpoint_id == checkpoint_id).order_by(CheckpointEdit.position)
    return session.scalars(query.options(selectinload(Edit.value)) if with_values else query).all()


def edit_methods(session: Session, *, checkpoint_id: UUID) -> dict[UUID, str]:
    """Return the method that writes each edit of a checkpoint."""
    query = select(CheckpointEdit.edit_id, CheckpointEdit.method).where(CheckpointEdit.checkpoint_id == checkpoint_id)
    return dict(session.execute(query).all())


def edits_by_id(session: Session, *, ids: Iterable[UUID]) -> dict[UUID, Edit]:
    return {edit.id: edit for edit in session.scalars(select(Edit).where(Edit.id.in_(set(ids))))}


def ready_edits(session: Session, *, model_id: UUID) -> Sequence[Edit]:
    """Return the ready edits of a model, oldest first."""
    query = select(Edit).where(Edit.model_id == model_id, Edit.state == "ready").order_by(Edit.id)
    return session.scalars(query).all()


def value_layers(session: Session, *, ids: Iterable[UUID]) -> dict[UUID, dict[str, int]]:
    """Return the layer that each edit's value was optimized for, by text encoder."""
    query = select(EditValue.edit_id, EditValue.encoders).where(EditValue.edit_id.in_(set(ids)))
    return {
        edit_id: {encoder["name"]: encoder["layer"] for encoder in encoders}
        for edit_id, encoders in session.execute(query)
    }


def select_evaluations(checkpoint_id: UUID, *, kind: str | None = None) -> Select[Evaluation]:
    query = select(Evaluation).where(Evaluation.checkpoint_id == checkpoint_id)
    return query.where(Evaluation.kind == kind) if kind else query


def latest_classifier_report(session: Session, *, checkpoint_id: UUID) -> JsonObject | None:
    """Return the newest report of a check or an evaluation of the checkpoint."""
    query = select(Evaluation.report).where(
        Evaluation.checkpoint_id == checkpoint_id,
        Evaluation.kind.in_(("check", "evaluation")),
        Evaluation.state == "ready",
    )
    return session.scalars(query.order_by(Evaluation.id.desc()).limit(1)).one_or_none()


def checkpoint_files_with(session: Session, *, sha256: str, limit: int) -> Sequence[tuple[Checkpoint, CheckpointFile]]:
    """Return the checkpoint files with these bytes, those of the newest checkpoint first."""
    query = select(Checkpoint, CheckpointFile).join(CheckpointFile, CheckpointFile.checkpoint_id == Checkpoint.id)
    query = query.where(CheckpointFile.sha256 == sha256).order_by(Checkpoint.id.desc(), CheckpointFile.path)
    rows = session.execute(query.limit(limit).options(selectinload(Checkpoint.model)))
    return [(checkpoint, file) for checkpoint, file in rows]


def model_files_with(session: Session, *, sha256: str) -> Sequence[tuple[Model, ModelFile]]:
    """Return the files of base models with these bytes."""
    query = select(Model, ModelFile).join(ModelFile, ModelFile.model_id == Model.id)
    query = query.where(ModelFile.sha256 == sha256).order_by(Model.id, ModelFile.path)
    return [(model, file) for model, file in session.execute(query)]
