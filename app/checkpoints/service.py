"""Read checkpoints and their files, retract them, and trace files."""

from collections.abc import Collection, Sequence
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.errors import CheckpointRetracted, FileNotFound
from app.checkpoints.files import list_files
from app.checkpoints.queries import get_checkpoint, get_published_checkpoint, require_published
from app.checkpoints.warnings import classifier_warnings, residual_warnings
from app.db.models import Checkpoint, Edit, Evaluation, Statistics
from app.db.pagination import PageCursor
from app.db.rows import column_values
from app.jobs.queries import running_progress
from app.models.queries import get_model
from editing.files import File
from emender.schemas.checkpoints import (
    UCE_METHODS,
    AliasOutcome,
    CheckpointOut,
    CheckpointSummary,
    EditInCheckpoint,
    EvaluationLink,
    FileOrigin,
    FileProvenance,
)
from emender.schemas.common import Page

MAX_ORIGINS = MAX_EVALUATIONS = 100


def read_checkpoint(session: Session, *, model_name: str, revision: str) -> CheckpointOut:
    return checkpoint_out(session, checkpoint=find_checkpoint(session, model=model_name, revision=revision))


def find_checkpoint(session: Session, *, model: str, revision: str) -> Checkpoint:
    """Return the checkpoint of a model by name. Raises `ModelNotFound` or `CheckpointNotFound`."""
    return get_checkpoint(session, model=get_model(session, name=model), revision=revision)


def list_checkpoints(session: Session, *, model_name: str, page: PageCursor[UUID]) -> Page[CheckpointSummary]:
    query = queries.select_checkpoints(get_model(session, name=model_name).id)
    rows, next_cursor = page.fetch(session, query, Checkpoint.id)
    return Page(items=_summaries(session, rows=rows), next=next_cursor)


def newest_checkpoints(session: Session) -> dict[str, CheckpointSummary]:
    """Return the newest published checkpoint of each model, by the model's name."""
    return {summary.model: summary for summary in _summaries(session, rows=queries.newest_of_each_model(session))}


def checkpoints_by_id(session: Session, *, ids: Collection[UUID]) -> dict[UUID, CheckpointSummary]:
    rows = list(queries.checkpoints_by_id(session, ids=ids).values())
    return {row.id: summary for row, summary in zip(rows, _summaries(session, rows=rows), strict=True)}


def retract(session: Session, *, model_name: str, version: str, reason: str, actor: str) -> CheckpointOut:
    """Stop serving a published checkpoint. Its record stays, and its aliases answer 410 until they are moved."""
    checkpoint = find_checkpoint(session, model=model_name, revision=version)
    session.refresh(checkpoint, with_for_update=True)
    require_published(checkpoint)
    checkpoint.state = "retracted"
    checkpoint.retracted_at = session.scalar(select(func.now()))
    checkpoint.problem = {"title": CheckpointRetracted.title, "detail": reason, "errors": []}
    target, before, after = checkpoint.audit_target, {"state": "published"}, {"state": "retracted"}
    record(session, actor=actor, action="checkpoint.retract", target=target, before=before, after=after, reason=reason)
    session.flush()
    return checkpoint_out(session, checkpoint=checkpoint)


def find_file(session: Session, *, model_name: str, revision: str, path: str) -> tuple[File, str]:
    """Return a file that a published checkpoint does not share with its base model, and the commit.

    The path is compared with those of the files, so no path is built from a client's string.
    """
    model = get_model(session, name=model_name)
    checkpoint = get_published_checkpoint(session, model=model, revision=revision)
    files = {file.path: file for file in list_files(checkpoint)}
    if path not in files:
        raise FileNotFound(f"{checkpoint.version} has no file {path[:200]!r}; it has {', '.join(files)}.")
    return files[path], checkpoint.commit or ""


def trace_file(session: Session, *, sha256: str) -> FileProvenance:
    """Return the newest checkpoints and the base models that have a file with these bytes."""
    size = 0
    origins = []
    for checkpoint, file in queries.checkpoint_files_with(session, sha256=sha256, limit=MAX_ORIGINS):
        size = file.size
        origins.append(
            FileOrigin(
                model=checkpoint.model.name,
                version=checkpoint.version,
                state=checkpoint.state,
                path=file.path,
                commit=checkpoint.commit,
                edits=edits_out(session, checkpoint=checkpoint),
                evaluations=_evaluation_links(session, checkpoint),
            )
        )
    for model, base in queries.model_files_with(session, sha256=sha256):
        size = base.size
        origin = FileOrigin(model=model.name, version=None, state=model.state, path=base.path, commit=None, edits=[])
        origins.append(origin)
    if not origins:
        raise FileNotFound("No checkpoint and no base model has a file of this sha256.")
    return FileProvenance(sha256=sha256, size=size, origins=origins)


def checkpoint_out(session: Session, *, checkpoint: Checkpoint) -> CheckpointOut:
    report, options = checkpoint.report or {}, checkpoint.options
    statistics = session.get_one(Statistics, checkpoint.statistics_id) if checkpoint.statistics_id else None
    edits = edits_out(session, checkpoint=checkpoint)
    return CheckpointOut.model_validate(
        {
            **_summaries(session, rows=[checkpoint])[0].model_dump(),
            "edits": edits,
            **{name: options.get(name) for name in ("residual_schedule", "moment_weight", *UCE_METHODS)},
            "contexts": options.get("contexts", "own") if "moment_weight" in options else None,
            "preserve": options.get("preserve", []),
            "statistics": (statistics.digest or "") if statistics else None,
            "files": checkpoint.files,
            "conflicts": report.get("conflicts", []),
            "warnings": [
                *residual_warnings(edits, options=options),
                *classifier_warnings(queries.latest_classifier_report(session, checkpoint_id=checkpoint.id)),
            ],
            "evaluations": _evaluation_links(session, checkpoint),
            "changed_layers": report.get("layers", []),
            "changed_projections": report.get("projections", []),
            "alias": _alias_outcome(checkpoint),
            "progress": running_progress(session, target_ids=[checkpoint.id]).get(checkpoint.id),
            "problem": checkpoint.problem,
        }
    )


def edits_out(session: Session, *, checkpoint: Checkpoint) -> list[EditInCheckpoint]:
    """Return the checkpoint's edits in order, each with the residual that the update left."""
    residuals: dict[str, float] = (checkpoint.report or {}).get("relative_residuals", {})
    methods = queries.edit_methods(session, checkpoint_id=checkpoint.id)
    return [
        edit_out(edit, relative_residual=residuals.get(str(edit.id)), method=methods[edit.id])
        for edit in queries.list_edits(session, checkpoint_id=checkpoint.id)
    ]


def edit_out(edit: Edit, *, relative_residual: float | None = None, method: str) -> EditInCheckpoint:
    return EditInCheckpoint(**column_values(edit), relative_residual=relative_residual, method=method)


def _evaluation_links(session: Session, checkpoint: Checkpoint) -> list[EvaluationLink]:
    newest = queries.select_evaluations(checkpoint.id).order_by(Evaluation.id.desc()).limit(MAX_EVALUATIONS)
    url = f"/v1/models/{checkpoint.model.name}/checkpoints/{checkpoint.version}/evaluations"
    return [
        EvaluationLink(id=row.id, kind=row.kind, state=row.state, url=f"{url}/{row.id}")
        for row in session.scalars(newest)
    ]


def _alias_outcome(checkpoint: Checkpoint) -> AliasOutcome | None:
    if checkpoint.alias is None:
        return None
    pending = {"moved": False, "detail": "It is moved when the checkpoint is published."}
    return AliasOutcome(name=checkpoint.alias, **((checkpoint.report or {}).get("alias") or pending))


def _summaries(session: Session, *, rows: Sequence[Checkpoint]) -> list[CheckpointSummary]:
    ids = [row.id for row in rows]
    names = queries.alias_names(session, checkpoint_ids=ids)
    counts = queries.edit_counts(session, checkpoint_ids=ids)
    numbers = queries.numbers(session, ids=[row.parent_id for row in rows if row.parent_id])
    return [
        CheckpointSummary(
            **column_values(row),
            version=row.version,
            model=row.model.name,
            edit_count=counts.get(row.id, 0),
            aliases=names[row.id],
            parent=f"v{numbers[row.parent_id]}" if row.parent_id else None,
        )
        for row in rows
    ]
