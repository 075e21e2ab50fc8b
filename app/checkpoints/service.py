"""Apply edits to a model, and what can be asked about the checkpoints that came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.errors import (
    CheckpointNotFound,
    CheckpointNotPublished,
    CheckpointRetracted,
    FileNotFound,
    StatisticsMissing,
)
from app.checkpoints.schemas import (
    AliasOutcome,
    ApplyCreate,
    ApplyPlan,
    CheckpointOut,
    CheckpointSummary,
    ConflictOut,
    EditInCheckpoint,
    FileOrigin,
    FileOut,
    FileProvenance,
    LayerOut,
)
from app.checkpoints.selection import Selection, conflicts, select_edits
from app.db.models import Checkpoint, CheckpointEdit, Edit, JsonObject, Model, Statistics
from app.dependencies import Page, PageRequest
from app.models.errors import ModelNotFound, ModelNotReady
from app.models.tokenizers import tokenizer_of
from app.problems import FieldError, Unprocessable
from app.queueing.outbox import enqueue
from app.storage.local import LocalStore
from editing.errors import EditingError
from editing.prompts import PromptTokenizer


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


def plan(session: Session, *, model_name: str, request: ApplyCreate, store: LocalStore, folder: Path) -> ApplyPlan:
    """What `apply` would do, with the same checks; creates nothing. `folder` is where tokenizers are laid out."""
    model = find_model(session, name=model_name)
    prepared = _prepare(session, model=model, request=request, store=store, folder=folder)
    selection = prepared.selection
    return ApplyPlan(
        model=model.name,
        edits=[_edit_in(edit) for edit in selection.edits],
        superseded=list(selection.superseded),
        conflicts=conflicts(selection.edits),
        alpha=request.alpha,
        layers=list(prepared.layers),
        statistics=prepared.statistics.digest or "",
    )


def apply(
    session: Session, *, model_name: str, request: ApplyCreate, store: LocalStore, folder: Path, actor: str
) -> CheckpointOut:
    """Number a new version and enqueue its building. Raises what is wrong with the request, field by field."""
    if queries.model_by_name(session, name=model_name, lock=True) is None:  # versions are numbered one after the other
        raise ModelNotFound(model_name)
    model = find_model(session, name=model_name)
    prepared = _prepare(session, model=model, request=request, store=store, folder=folder)
    options: JsonObject = {"residual": request.residual, "mass": request.mass, "preserve": request.preserve}
    checkpoint = Checkpoint(
        model_id=model.id,
        number=queries.last_number(session, model_id=model.id) + 1,
        statistics_id=prepared.statistics.id,
        parent_id=prepared.start.id if prepared.start else None,
        alpha=request.alpha,
        layers=list(prepared.layers),
        options=options,
        notes=request.notes,
        created_by=actor,
    )
    if request.alias is not None:
        checkpoint.alias = request.alias
        checkpoint.alias_moves = queries.alias_moves(session, model_id=model.id, name=request.alias)
    checkpoint.edits = [
        CheckpointEdit(position=position, edit_id=edit.id) for position, edit in enumerate(prepared.selection.edits)
    ]
    session.add(checkpoint)
    session.flush()
    enqueue(session, kind="build_checkpoint", target_id=checkpoint.id)
    record(
        session,
        actor=actor,
        action="checkpoint.apply",
        target=f"checkpoint:{model.name}/v{checkpoint.number}",
        details={
            "edits": [str(edit.id) for edit in prepared.selection.edits],
            "alpha": request.alpha,
            "layers": list(prepared.layers),
            "alias": request.alias,
            "notes": request.notes,
        },
    )
    session.refresh(checkpoint)
    return checkpoint_out(session, checkpoint=checkpoint)


def read_checkpoint(session: Session, *, model_name: str, revision: str) -> CheckpointOut:
    model = find_model(session, name=model_name)
    return checkpoint_out(session, checkpoint=find_checkpoint(session, model=model, revision=revision))


def list_checkpoints(session: Session, *, model_name: str, page: PageRequest) -> Page[CheckpointSummary]:
    """Newest first."""
    model = find_model(session, name=model_name)
    rows = session.scalars(page.select(queries.checkpoints_of(model.id), Checkpoint.id)).all()
    return page.page(rows, _summaries(session, rows=rows), [row.id for row in rows])


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
    record(session, actor=actor, action="checkpoint.retract", target=target, details={"reason": reason})
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
    """Where a file in the wild came from: every checkpoint and base model that has these bytes."""
    size = 0
    origins = []
    for checkpoint, file in queries.checkpoint_files_like(session, sha256=sha256):
        size = file.size
        origins.append(
            FileOrigin(
                model=checkpoint.model.name,
                version=f"v{checkpoint.number}",
                state=checkpoint.state,
                path=file.path,
                commit=checkpoint.commit,
                edits=edits_out(session, checkpoint=checkpoint),
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
    statistics = session.get_one(Statistics, checkpoint.statistics_id)
    summary = _summaries(session, rows=[checkpoint])[0]
    return CheckpointOut(
        **summary.model_dump(),
        edits=edits_out(session, checkpoint=checkpoint),
        residual=checkpoint.options["residual"],
        mass=checkpoint.options["mass"],
        preserve=checkpoint.options["preserve"],
        statistics=statistics.digest or "",
        files=[FileOut(path=file.path, sha256=file.sha256, size=file.size) for file in checkpoint.files],
        conflicts=[ConflictOut(**conflict) for conflict in report.get("conflicts", [])],
        changed_layers=[LayerOut(**layer) for layer in report.get("layers", [])],
        alias=_alias_outcome(checkpoint),
        progress=queries.progress(session, checkpoint_id=checkpoint.id) if checkpoint.state == "building" else None,
        problem=checkpoint.problem,
    )


def edits_out(session: Session, *, checkpoint: Checkpoint) -> list[EditInCheckpoint]:
    """The checkpoint's edits in order, each with the residual that stage II left."""
    residuals: dict[str, float] = (checkpoint.report or {}).get("residuals", {})
    return [
        _edit_in(edit, residual=residuals.get(str(edit.id)))
        for edit in queries.edits_in(session, checkpoint_id=checkpoint.id)
    ]


def _edit_in(edit: Edit, *, residual: float | None = None) -> EditInCheckpoint:
    return EditInCheckpoint(id=edit.id, source=edit.source, destination=edit.destination, residual=residual)


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


@dataclass(frozen=True)
class _Prepared:
    selection: Selection
    layers: tuple[int, ...]
    statistics: Statistics
    start: Checkpoint | None


def _prepare(session: Session, *, model: Model, request: ApplyCreate, store: LocalStore, folder: Path) -> _Prepared:
    """Everything that can be said against the request before any work is done."""
    if model.state != "ready":
        raise ModelNotReady(model.name, model.state)
    _check_choice(request)
    start = None
    if request.base is not None:
        try:
            start = find_checkpoint(session, model=model, revision=request.base)
        except CheckpointNotFound as error:
            raise Unprocessable.at("/from", error.detail) from None
    selection = select_edits(session, model=model, request=request, start=start)
    layers = _layers(model, request.layers, last=selection.layer)
    if request.preserve:
        _check_prompts(request.preserve, tokenizer_of(session, model_id=model.id, store=store, folder=folder))
    statistics = queries.newest_statistics(session, model_id=model.id)
    if statistics is None:
        latest = queries.newest_statistics(session, model_id=model.id, state=None)
        raise StatisticsMissing(model.name, under_way=latest is not None and latest.state != "failed")
    return _Prepared(selection=selection, layers=layers, statistics=statistics, start=start)


def _check_choice(request: ApplyCreate) -> None:
    if (request.edits is None) == (request.base is None):
        raise Unprocessable.at("/edits", "Give exactly one of `edits` and `from`.")
    if request.base is None:
        for field in ("add", "remove"):
            if getattr(request, field):
                raise Unprocessable.at(f"/{field}", f"`{field}` goes with `from`.")


def _check_prompts(preserve: Sequence[str], tokenizer: PromptTokenizer) -> None:
    errors = []
    for index, prompt in enumerate(preserve):
        try:
            tokenizer.locate("{}", prompt)
        except EditingError as error:
            errors.append(FieldError(pointer=f"/preserve/{index}", detail=error.detail))
    if errors:
        raise Unprocessable(errors[0].detail, errors=errors[:100])


def _layers(model: Model, asked: Sequence[int] | None, *, last: int) -> tuple[int, ...]:
    """The layers to edit, ascending: those asked for, else 0 … `last`, where the values were optimised."""
    if asked is None:
        return tuple(range(last + 1))
    depth = min(encoder["layers"] for encoder in model.encoders)
    errors = []
    for index, layer in enumerate(asked):
        if not 0 <= layer < depth:
            detail = f"There is no layer {layer}: the text encoder has 0 … {depth - 1}."
            errors.append(FieldError(pointer=f"/layers/{index}", detail=detail))
        elif layer in asked[:index]:
            errors.append(FieldError(pointer=f"/layers/{index}", detail=f"The layer {layer} is named twice."))
    if errors:
        raise Unprocessable(errors[0].detail, errors=errors)
    if max(asked) != last:
        raise Unprocessable.at(
            "/layers",
            f"The edits' values were optimised for layer {last}, so that one must be the last, not {max(asked)}.",
        )
    return tuple(sorted(asked))
