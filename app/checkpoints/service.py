"""What can be asked about checkpoints and their files, and how one is retracted."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.errors import (
    CheckpointNotFound,
    CheckpointNotPublished,
    CheckpointRetracted,
    FileNotFound,
)
from app.db.models import Checkpoint, Edit, Evaluation, JsonObject, Model, Statistics
from app.db.pagination import PageCursor
from app.jobs.queries import running_progress, work_status
from app.models.errors import ModelNotFound
from emender.schemas.checkpoints import (
    AliasOutcome,
    CheckpointOut,
    CheckpointSummary,
    ConflictOut,
    CrossAttentionOut,
    EditInCheckpoint,
    EditWarning,
    EvaluationLink,
    FileOrigin,
    FileOut,
    FileProvenance,
    LayerOut,
    Method,
    ProjectionOut,
)
from emender.schemas.common import Page, WorkStatus

MOST_ORIGINS = MOST_EVALUATIONS = 100
LEFT = 0.5
"""An edit of which more than this is left undone is warned of."""


@dataclass(frozen=True)
class ServedFile:
    """A blob of the store, under the path at which a checkpoint has it."""

    path: str
    sha256: str
    size: int
    commit: str


def find_model(session: Session, *, name: str) -> Model:
    model = queries.model_by_name(session, name=name)
    if model is None:
        raise ModelNotFound(name)
    return model


def find_checkpoint(session: Session, *, model: Model, revision: str) -> Checkpoint:
    """By version, alias, commit or `main`. Raises `CheckpointNotFound`."""
    checkpoint = queries.checkpoint_at(session, model_id=model.id, revision=revision)
    if checkpoint is None:
        raise CheckpointNotFound(model.name, revision)
    return checkpoint


def require_served(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointRetracted` or `CheckpointNotPublished` where the checkpoint gives no files."""
    if checkpoint.state == "retracted":
        raise CheckpointRetracted(checkpoint)
    if checkpoint.state != "published":
        raise CheckpointNotPublished(checkpoint)


def read_checkpoint(session: Session, *, model_name: str, revision: str) -> CheckpointOut:
    model = find_model(session, name=model_name)
    return checkpoint_out(session, checkpoint=find_checkpoint(session, model=model, revision=revision))


def checkpoint_status(session: Session, *, model_name: str, revision: str) -> WorkStatus:
    model = find_model(session, name=model_name)
    return work_status(session, find_checkpoint(session, model=model, revision=revision))


def list_checkpoints(session: Session, *, model_name: str, page: PageCursor[UUID]) -> Page[CheckpointSummary]:
    """Newest first."""
    model = find_model(session, name=model_name)
    rows, next_cursor = page.fetch(session, queries.checkpoints_of(model.id), Checkpoint.id)
    return Page(items=_summaries(session, rows=rows), next=next_cursor)


def newest_versions(session: Session) -> dict[str, CheckpointSummary]:
    """The newest published version of each model, by the model's name."""
    rows = queries.newest_of_each_model(session)
    return {summary.model: summary for summary in _summaries(session, rows=rows)}


def versions_by_id(session: Session, *, ids: Collection[UUID]) -> dict[UUID, CheckpointSummary]:
    rows = list(queries.checkpoints_by_id(session, ids=ids).values())
    return {row.id: summary for row, summary in zip(rows, _summaries(session, rows=rows), strict=True)}


def retract(session: Session, *, model_name: str, version: str, reason: str, actor: str) -> CheckpointOut:
    """Stop serving a published version. Its record stays; an alias that points at it answers 410 until it is moved."""
    model = find_model(session, name=model_name)
    checkpoint = find_checkpoint(session, model=model, revision=version)
    session.refresh(checkpoint, with_for_update=True)
    require_served(checkpoint)
    checkpoint.state = "retracted"
    checkpoint.retracted_at = session.scalar(select(func.now()))
    checkpoint.problem = {"title": CheckpointRetracted.title, "detail": reason, "errors": []}
    target = f"checkpoint:{model.name}/v{checkpoint.number}"
    record(
        session,
        actor=actor,
        action="checkpoint.retract",
        target=target,
        before={"state": "published"},
        after={"state": checkpoint.state},
        reason=reason,
    )
    session.flush()
    return checkpoint_out(session, checkpoint=checkpoint)


def find_file(session: Session, *, model_name: str, revision: str, path: str) -> ServedFile:
    """A file of a published checkpoint, found by comparing its path with those that there are."""
    model = find_model(session, name=model_name)
    checkpoint = find_checkpoint(session, model=model, revision=revision)
    require_served(checkpoint)
    for file in checkpoint.files:
        if file.path == path:
            return ServedFile(file.path, file.sha256, file.size, commit=checkpoint.commit or "")
    known = ", ".join(file.path for file in checkpoint.files)
    raise FileNotFound(f"v{checkpoint.number} has no file of that path; it has {known}.")


def trace_file(session: Session, *, sha256: str) -> FileProvenance:
    """Where a file in the wild came from: the newest checkpoints and the base models that have these bytes."""
    size = 0
    origins = []
    for checkpoint, file in queries.checkpoint_files_like(session, sha256=sha256, limit=MOST_ORIGINS):
        size = file.size
        origins.append(
            FileOrigin(
                model=checkpoint.model.name,
                version=f"v{checkpoint.number}",
                state=checkpoint.state,
                path=file.path,
                commit=checkpoint.commit,
                edits=edits_out(session, checkpoint=checkpoint),
                evaluations=_evaluations(session, checkpoint),
            )
        )
    for model, base in queries.model_files_like(session, sha256=sha256):
        size = base.size
        origin = FileOrigin(model=model.name, version=None, state=model.state, path=base.path, commit=None, edits=[])
        origins.append(origin)
    if not origins:
        raise FileNotFound("No checkpoint and no base model has a file of this sha256.")
    return FileProvenance(sha256=sha256, size=size, origins=origins)


def checkpoint_out(session: Session, *, checkpoint: Checkpoint) -> CheckpointOut:
    report = checkpoint.report or {}
    statistics = session.get_one(Statistics, checkpoint.statistics_id) if checkpoint.statistics_id else None
    options = checkpoint.options
    summary = _summaries(session, rows=[checkpoint])[0]
    edits = edits_out(session, checkpoint=checkpoint)
    return CheckpointOut(
        **summary.model_dump(),
        edits=edits,
        residual_schedule=options.get("residual_schedule"),
        moment_weight=options.get("moment_weight"),
        contexts=options.get("contexts", "own") if "moment_weight" in options else None,
        preserve=options.get("preserve", []),
        cross_attention=cross_attention_out(options),
        statistics=(statistics.digest or "") if statistics else None,
        files=[FileOut(path=file.path, sha256=file.sha256, size=file.size) for file in checkpoint.files],
        conflicts=[ConflictOut(**conflict) for conflict in report.get("conflicts", [])],
        warnings=[
            *(_left(edit, options=options) for edit in edits if (edit.relative_residual or 0) > LEFT),
            *_judged(queries.latest_judgement(session, checkpoint_id=checkpoint.id)),
        ],
        evaluations=_evaluations(session, checkpoint),
        changed_layers=[LayerOut(**layer) for layer in report.get("layers", [])],
        changed_projections=[ProjectionOut(**changed) for changed in report.get("projections", [])],
        alias=_alias_outcome(checkpoint),
        progress=running_progress(session, target_ids=[checkpoint.id]).get(checkpoint.id)
        if checkpoint.state == "building"
        else None,
        problem=checkpoint.problem,
    )


def edits_out(session: Session, *, checkpoint: Checkpoint) -> list[EditInCheckpoint]:
    """The checkpoint's edits in order, each with the residual that stage II left."""
    residuals: dict[str, float] = (checkpoint.report or {}).get("residuals", {})
    methods = queries.methods_in(session, checkpoint_id=checkpoint.id)
    return [
        edit_in(edit, relative_residual=residuals.get(str(edit.id)), method=methods[edit.id])
        for edit in queries.edits_in(session, checkpoint_id=checkpoint.id)
    ]


def edit_in(edit: Edit, *, relative_residual: float | None = None, method: str) -> EditInCheckpoint:
    return EditInCheckpoint(
        id=edit.id,
        source=edit.source,
        destination=edit.destination,
        relative_residual=relative_residual,
        method=cast(Method, method),
    )


def cross_attention_out(options: JsonObject) -> CrossAttentionOut | None:
    settings = options.get("cross_attention")
    return CrossAttentionOut(**settings) if settings else None


def _left(edit: EditInCheckpoint, *, options: JsonObject) -> EditWarning:
    if edit.method == "text_encoder":
        name, weight = "moment_weight", options["moment_weight"]
        why = "Words that are frequent in the statistics' captions resist"
    else:
        name, weight = "regularization_weight", options["cross_attention"]["regularization_weight"]
        why = "What the U-Net reads of it is held by preserved prompts or by `regularization_weight`"
    return EditWarning(
        edit=edit.id,
        detail=f"{edit.source!r} was hardly changed: {edit.relative_residual:.0%} of the change is left undone. {why}; "
        f"apply with a lower `{name}`, {weight / 10:g} perhaps instead of {weight:g}.",
    )


def _judged(report: JsonObject | None) -> Iterator[EditWarning]:
    """What the classifier saw of edits that did not succeed."""
    for edit in (report or {}).get("edits", []):
        if edit["succeeded"]:
            continue
        if edit["destination"] is None:
            detail = (
                f"{edit['source']!r} is still seen, with confidence {edit['after']:.2f}; before {edit['before']:.2f}."
            )
        else:
            detail = (
                f"Pictures of {edit['source']!r} show {edit['destination']!r} with confidence {edit['after']:.2f}, "
                f"its own pictures with {edit['destination_score']:.2f}."
            )
        yield EditWarning(edit=edit["edit"], detail=f"{detail} Look at previews; other templates or settings may help.")


def _evaluations(session: Session, checkpoint: Checkpoint) -> list[EvaluationLink]:
    newest = queries.evaluations_of(checkpoint.id).order_by(Evaluation.id.desc()).limit(MOST_EVALUATIONS)
    url = f"/v1/models/{checkpoint.model.name}/checkpoints/v{checkpoint.number}/evaluations"
    return [
        EvaluationLink(id=row.id, kind=row.kind, state=row.state, url=f"{url}/{row.id}")
        for row in session.scalars(newest)
    ]


def _alias_outcome(checkpoint: Checkpoint) -> AliasOutcome | None:
    if checkpoint.alias is None:
        return None
    outcome = (checkpoint.report or {}).get("alias")
    if outcome is None:
        detail = "It is moved once the version is published."
        return AliasOutcome(name=checkpoint.alias, moved=False, detail=detail)
    return AliasOutcome(name=checkpoint.alias, **outcome)


def _summaries(session: Session, *, rows: Sequence[Checkpoint]) -> list[CheckpointSummary]:
    ids = [row.id for row in rows]
    names = queries.alias_names(session, checkpoint_ids=ids)
    counts = queries.edit_counts(session, checkpoint_ids=ids)
    numbers = queries.numbers(session, ids=[row.parent_id for row in rows if row.parent_id])
    return [
        CheckpointSummary(
            version=f"v{row.number}",
            model=row.model.name,
            state=row.state,
            commit=row.commit,
            edit_count=counts.get(row.id, 0),
            alpha=row.alpha,
            layers=row.layers,
            aliases=names[row.id],
            notes=row.notes,
            parent=f"v{numbers[row.parent_id]}" if row.parent_id else None,
            created_by=row.created_by,
            created_at=row.created_at,
            published_at=row.published_at,
            retracted_at=row.retracted_at,
        )
        for row in rows
    ]
