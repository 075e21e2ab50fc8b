"""Choose edits, number a version, hand its building to a worker; or say what would be done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.errors import CheckpointNotFound, StatisticsMissing
from app.checkpoints.selection import Selection, conflicts, select_edits
from app.checkpoints.service import checkpoint_out, cross_attention_out, edit_in, find_checkpoint, find_model
from app.db.models import Checkpoint, CheckpointEdit, JsonObject, Model, Statistics
from app.jobs.enqueue import enqueue
from app.jobs.kinds import BUILD_CHECKPOINT
from app.models.errors import ModelNotFound, ModelNotReady
from app.models.tokenizers import tokenizers_of
from app.problems import Unprocessable
from app.storage.store import Store
from editing.errors import EditingError
from editing.families.layout import default_layers
from editing.prompts import PromptTokenizer
from emender.schemas.checkpoints import MAX_EDITS_IN_CONTEXTS, METHOD_SETTINGS, ApplyCreate, ApplyPlan, CheckpointOut
from emender.schemas.common import FieldError


def plan(session: Session, *, model_name: str, request: ApplyCreate, store: Store, folder: Path) -> ApplyPlan:
    """What `apply` would do, with the same checks; creates nothing. `folder` is where tokenizers are laid out."""
    model = find_model(session, name=model_name)
    prepared = _prepare(session, model=model, request=request, store=store, folder=folder)
    selection = prepared.selection
    return ApplyPlan(
        model=model.name,
        edits=[edit_in(edit, method=selection.method_of(edit)) for edit in selection.edits],
        superseded=list(selection.superseded),
        conflicts=conflicts(selection.edits),
        alpha=prepared.alpha,
        layers=prepared.layers,
        cross_attention=cross_attention_out(prepared.options),
        statistics=(prepared.statistics.digest or "") if prepared.statistics else None,
    )


def apply(
    session: Session, *, model_name: str, request: ApplyCreate, store: Store, folder: Path, actor: str
) -> CheckpointOut:
    """Number a new version and enqueue its building. Raises what is wrong with the request, field by field."""
    model = queries.model_by_name(session, name=model_name, lock=True)  # versions are numbered one after the other
    if model is None:
        raise ModelNotFound(model_name)
    prepared = _prepare(session, model=model, request=request, store=store, folder=folder)
    checkpoint = Checkpoint(
        model_id=model.id,
        number=queries.last_number(session, model_id=model.id) + 1,
        statistics_id=prepared.statistics.id if prepared.statistics else None,
        parent_id=prepared.start.id if prepared.start else None,
        alpha=prepared.alpha,
        layers=prepared.layers,
        options=prepared.options,
        notes=request.notes,
        created_by=actor,
    )
    if request.alias is not None:
        checkpoint.alias = request.alias
        checkpoint.alias_moves = queries.alias_moves(session, model_id=model.id, name=request.alias)
    checkpoint.edits = [
        CheckpointEdit(position=position, edit_id=edit.id, method=prepared.selection.method_of(edit))
        for position, edit in enumerate(prepared.selection.edits)
    ]
    session.add(checkpoint)
    session.flush()
    enqueue(session, kind=BUILD_CHECKPOINT, target_id=checkpoint.id, actor=actor)
    record(
        session,
        actor=actor,
        action="checkpoint.apply",
        target=f"checkpoint:{model.name}/v{checkpoint.number}",
        details={
            "edits": [str(edit.id) for edit in prepared.selection.edits],
            "method": request.method,
            "alpha": prepared.alpha,
            "layers": prepared.options.get("layers", checkpoint.layers),
            "alias": request.alias,
        },
        after={"state": checkpoint.state},
        reason=request.notes,
    )
    session.refresh(checkpoint)
    return checkpoint_out(session, checkpoint=checkpoint)


@dataclass(frozen=True)
class _Prepared:
    """What goes into the checkpoint's row. Of the method that has no edits there are no settings either."""

    selection: Selection
    alpha: float | None
    layers: list[int]
    """Of the first text encoder; `options` has those of several."""
    options: JsonObject
    statistics: Statistics | None
    start: Checkpoint | None


def _prepare(session: Session, *, model: Model, request: ApplyCreate, store: Store, folder: Path) -> _Prepared:
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
    if request.preserve:
        _check_prompts(request.preserve, tokenizers_of(session, model_id=model.id, store=store, folder=folder))
    prepared = _Prepared(selection, alpha=None, layers=[], options={}, statistics=None, start=start)
    if selection.layers:
        prepared = _with_memory(session, prepared, model=model, request=request)
    if selection.in_cross_attention:
        prepared = _with_cross_attention(prepared, request=request)
    return prepared


def _with_memory(session: Session, prepared: _Prepared, *, model: Model, request: ApplyCreate) -> _Prepared:
    """The settings of the edits in the memory: the request's; those of the start where it adds to cross-attention."""
    start = prepared.start
    if request.method != "text_encoder":
        assert start is not None and start.statistics_id is not None
        statistics = session.get_one(Statistics, start.statistics_id)
        kept = {name: setting for name, setting in start.options.items() if name != "cross_attention"}
        return replace(prepared, alpha=start.alpha, layers=start.layers, options=kept, statistics=statistics)
    in_text_encoder = len(prepared.selection.edits) - len(prepared.selection.in_cross_attention)
    if request.contexts == "many" and in_text_encoder > MAX_EDITS_IN_CONTEXTS:
        raise Unprocessable.at(
            "/contexts",
            f"{in_text_encoder} edits are too many for `many` contexts; the maximum is {MAX_EDITS_IN_CONTEXTS}. "
            "Set `contexts` to `own`, or apply fewer edits.",
        )
    layers = _layers(model, request.layers, lasts=prepared.selection.layers)
    newest = queries.newest_statistics(session, model_id=model.id)
    if newest is None:
        latest = queries.newest_statistics(session, model_id=model.id, state=None)
        raise StatisticsMissing(model.name, under_way=latest is not None and latest.state != "failed")
    names = ("residual_schedule", "moment_weight", "contexts", "preserve")
    options: JsonObject = {name: getattr(request, name) for name in names}
    if len(layers) > 1:
        options["layers"] = {encoder: list(own) for encoder, own in layers.items()}
    return replace(
        prepared, alpha=request.alpha, layers=list(next(iter(layers.values()))), options=options, statistics=newest
    )


def _with_cross_attention(prepared: _Prepared, *, request: ApplyCreate) -> _Prepared:
    """The settings of the edits in cross-attention: the request's; those of the start where it adds to the memory."""
    if request.method == "cross_attention":
        names = (*METHOD_SETTINGS["cross_attention"], "preserve")
        settings = {name: getattr(request, name) for name in names}
    else:
        assert prepared.start is not None
        settings = prepared.start.options["cross_attention"]
    return replace(prepared, options=prepared.options | {"cross_attention": settings})


def _check_choice(request: ApplyCreate) -> None:
    _check_settings(request)
    if (request.edits is None) == (request.base is None):
        raise Unprocessable.at("/edits", "Give exactly one of `edits` and `from`.")
    if request.base is None:
        for field in ("add", "remove"):
            if getattr(request, field):
                raise Unprocessable.at(f"/{field}", f"`{field}` goes with `from`.")


def _check_settings(request: ApplyCreate) -> None:
    """Refuse settings that the method would leave unread."""
    other = next(method for method in METHOD_SETTINGS if method != request.method)
    foreign = [name for name in METHOD_SETTINGS[other] if name in request.model_fields_set]
    if request.preset is not None and "preset" in foreign:
        foreign = ["preset"]  # it has filled in the others
    if foreign:
        own = ", ".join(f"`{name}`" for name in (*METHOD_SETTINGS[request.method], "preserve"))
        errors = [
            FieldError(
                pointer=f"/{name}",
                detail=f"`{name}` is a setting of the method {other!r}; {request.method!r} takes {own}.",
            )
            for name in foreign
        ]
        raise Unprocessable(errors[0].detail, errors=errors)


def _check_prompts(preserve: Sequence[str], tokenizers: Sequence[PromptTokenizer]) -> None:
    errors = []
    for index, prompt in enumerate(preserve):
        try:
            for tokenizer in tokenizers:
                tokenizer.locate("{}", prompt)
        except EditingError as error:
            errors.append(FieldError(pointer=f"/preserve/{index}", detail=error.detail))
    if errors:
        raise Unprocessable(errors[0].detail, errors=errors[:100])


def _layers(model: Model, asked: Sequence[int] | None, *, lasts: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
    """The layers to edit by text encoder, ascending: those asked for, else the default ones up to `lasts`, where the
    values were optimised."""
    if asked is None:
        return {name: default_layers(model.family or "", name, last=last) for name, last in lasts.items()}
    if len(lasts) > 1:
        detail = "The model has several text encoders, which one list cannot fit: leave `layers` out."
        raise Unprocessable.at("/layers", detail)
    ((name, last),) = lasts.items()
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
    return {name: tuple(sorted(asked))}
