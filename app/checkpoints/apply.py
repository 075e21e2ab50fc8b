"""Apply edits: number a new checkpoint and enqueue its build, or plan it in a dry run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.orm import Session

from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.errors import StatisticsMissing
from app.checkpoints.selection import Selection, declared_edit_conflicts, select_edits
from app.checkpoints.service import checkpoint_out, edit_out
from app.db.models import Checkpoint, CheckpointEdit, JsonObject, Model, Statistics
from app.jobs.enqueue import enqueue
from app.jobs.kinds import BUILD_CHECKPOINT
from app.models.queries import family_of, get_ready_model, list_methods, newest_statistics
from app.models.tokenizers import tokenizers_of
from app.problems import Unprocessable
from app.storage.store import Store
from editing.errors import EditingError
from editing.families.layout import choose_default_layers
from editing.prompts import PromptTokenizer
from emender.schemas.checkpoints import (
    MAX_EDITS_IN_CONTEXTS,
    METHOD_SETTINGS,
    UCE_METHODS,
    ApplyCreate,
    ApplyPlan,
    CheckpointOut,
)


def plan(session: Session, *, model_name: str, request: ApplyCreate, store: Store, folder: Path) -> ApplyPlan:
    """Make the same checks as `apply` and return what it would do. `folder` is `settings.data_dir`."""
    model = get_ready_model(session, name=model_name)
    inputs = _prepare(session, model=model, request=request, store=store, folder=folder)
    selection = inputs.selection
    return ApplyPlan(
        model=model.name,
        edits=[edit_out(edit, method=selection.methods[edit.id]) for edit in selection.edits],
        superseded=list(selection.superseded),
        conflicts=declared_edit_conflicts(selection.edits),
        alpha=inputs.alpha,
        layers=inputs.layers,
        **{name: inputs.options.get(name) for name in UCE_METHODS},
        statistics=(inputs.statistics.digest or "") if inputs.statistics else None,
    )


def apply(
    session: Session, *, model_name: str, request: ApplyCreate, store: Store, folder: Path, actor: str
) -> CheckpointOut:
    """Create a checkpoint with the next number and enqueue its build.

    Raises `Unprocessable` with a pointer to each wrong field.
    """
    model = get_ready_model(session, name=model_name, lock=True)  # versions are numbered one after the other
    inputs = _prepare(session, model=model, request=request, store=store, folder=folder)
    selection = inputs.selection
    checkpoint = Checkpoint(
        model_id=model.id,
        number=queries.last_number(session, model_id=model.id) + 1,
        statistics_id=inputs.statistics.id if inputs.statistics else None,
        parent_id=inputs.start.id if inputs.start else None,
        alpha=inputs.alpha,
        layers=inputs.layers,
        options=inputs.options,
        notes=request.notes,
        alias=request.alias,
        created_by=actor,
    )
    if request.alias is not None:
        checkpoint.alias_moves = queries.count_alias_moves(session, model_id=model.id, name=request.alias)
    checkpoint.edits = [
        CheckpointEdit(position=position, edit_id=edit.id, method=selection.methods[edit.id])
        for position, edit in enumerate(selection.edits)
    ]
    session.add(checkpoint)
    session.flush()
    enqueue(session, kind=BUILD_CHECKPOINT, target_id=checkpoint.id, actor=actor)
    record(
        session,
        actor=actor,
        action="checkpoint.apply",
        target=checkpoint.audit_target,
        details={
            "edits": [str(edit.id) for edit in selection.edits],
            "layers": inputs.options.get("layers", inputs.layers),
            **{"method": request.method, "alpha": inputs.alpha, "alias": request.alias},
        },
        after={"state": checkpoint.state},
        reason=request.notes,
    )
    session.refresh(checkpoint)
    return checkpoint_out(session, checkpoint=checkpoint)


@dataclass
class _Inputs:
    """What the checkpoint's row is made of. A method without edits has no settings."""

    selection: Selection
    start: Checkpoint | None
    statistics: Statistics | None = None
    alpha: float | None = None
    layers: list[int] = field(default_factory=list)
    """Of the first text encoder; `options` has those of several."""
    options: JsonObject = field(default_factory=dict)


def _prepare(session: Session, *, model: Model, request: ApplyCreate, store: Store, folder: Path) -> _Inputs:
    """Check the request against the database, and collect the settings of each method."""
    _check_settings(model, request)
    start = _find_start(session, model=model, request=request)
    selection = select_edits(session, model=model, request=request, start=start)
    if request.preserve:
        _check_prompts(request.preserve, tokenizers_of(session, model_id=model.id, store=store, folder=folder))
    inputs = _Inputs(selection, start)
    if selection.layers and request.method == "text_encoder":
        _set_text_encoder(session, inputs, model=model, request=request)
    elif selection.layers:  # the edits of `start`, written as they were there
        assert start is not None
        inputs.statistics = session.get(Statistics, start.statistics_id)
        inputs.alpha, inputs.layers = start.alpha, start.layers
        inputs.options = {name: value for name, value in start.options.items() if name not in UCE_METHODS}
    method = family_of(model).projection_method
    if selection.written_by(method):
        if request.method == method:
            settings = {name: getattr(request, name) for name in (*METHOD_SETTINGS[method], "preserve")}
        else:
            assert start is not None
            settings = start.options[method]
        inputs.options = inputs.options | {method: settings}
    return inputs


def _set_text_encoder(session: Session, inputs: _Inputs, *, model: Model, request: ApplyCreate) -> None:
    count = len(inputs.selection.written_by("text_encoder"))
    if request.contexts == "many" and count > MAX_EDITS_IN_CONTEXTS:
        raise Unprocessable.at(
            "/contexts",
            f"`many` takes at most {MAX_EDITS_IN_CONTEXTS} edits, and there are {count}. Apply fewer edits, or write "
            "them with `own`.",
        )
    layers = _choose_layers(model, request.layers, last_layers=inputs.selection.layers)
    inputs.statistics = newest_statistics(session, model_id=model.id)
    if inputs.statistics is None:
        estimating = newest_statistics(session, model_id=model.id, states=("queued", "estimating")) is not None
        hint = f'Make them with POST /v1/models/{model.name}/statistics {{"captions": "…"}}'
        if estimating:
            hint = f"They are being estimated: retry when GET /v1/models/{model.name} shows them"
        raise StatisticsMissing(f"The model {model.name!r} has no second moments. {hint}.")
    inputs.alpha, inputs.layers = request.alpha, list(next(iter(layers.values())))
    names = ("residual_schedule", "moment_weight", "contexts", "preserve")
    inputs.options = {name: getattr(request, name) for name in names}
    if len(layers) > 1:
        inputs.options["layers"] = {encoder: list(own) for encoder, own in layers.items()}


def _find_start(session: Session, *, model: Model, request: ApplyCreate) -> Checkpoint | None:
    """Return the checkpoint that `from` names, if the request has it."""
    if (request.edits is None) == (request.base is None):
        raise Unprocessable.at("/edits", "Give exactly one of `edits` and `from`.")
    if request.base is None:
        present = [name for name in ("add", "remove") if getattr(request, name)]
        Unprocessable.raise_for([(f"/{name}", f"`{name}` needs `from`.") for name in present])
        return None
    start = queries.find_checkpoint(session, model=model, revision=request.base)
    if start is None:
        raise Unprocessable.at("/from", f"The model {model.name!r} has no version or alias {request.base!r}.")
    return start


def _check_settings(model: Model, request: ApplyCreate) -> None:
    """Refuse a method that the model has no place for, and settings that only another method reads."""
    methods = list_methods(model)
    if request.method not in methods:
        lacks = "U-Net" if request.method == "cross_attention" else "transformer"
        detail = f"A {family_of(model).pipeline_class} has no {lacks}. Use one of its methods: {', '.join(methods)}."
        raise Unprocessable.at("/method", detail)
    other = next(method for method in methods if method != request.method)
    foreign = [name for name in METHOD_SETTINGS[other] if name in request.model_fields_set]
    if request.preset is not None and "preset" in foreign:
        foreign = ["preset"]  # it has set the others
    own = ", ".join(f"`{name}`" for name in (*METHOD_SETTINGS[request.method], "preserve"))
    why = f"is a setting of the method {other!r}; {request.method!r} takes {own}."
    Unprocessable.raise_for([(f"/{name}", f"`{name}` {why}") for name in foreign])


def _check_prompts(preserve: Sequence[str], tokenizers: Sequence[PromptTokenizer]) -> None:
    errors = []
    for index, prompt in enumerate(preserve):
        try:
            for tokenizer in tokenizers:
                tokenizer.locate("{}", prompt)
        except EditingError as error:
            errors.append((f"/preserve/{index}", error.detail))
    Unprocessable.raise_for(errors)


def _choose_layers(
    model: Model, requested: Sequence[int] | None, *, last_layers: Mapping[str, int]
) -> Mapping[str, tuple[int, ...]]:
    """Return the layers to edit by text encoder, ascending.

    By default these are the usual layers up to the last, which the values were optimized for.
    """
    if requested is None:
        return {name: choose_default_layers(model.family or "", name, last=last) for name, last in last_layers.items()}
    if len(last_layers) > 1:
        detail = "The model has several text encoders, which one list of layers cannot fit: leave `layers` out."
        raise Unprocessable.at("/layers", detail)
    ((name, last),) = last_layers.items()
    depth = min(encoder["layers"] for encoder in model.encoders)
    errors = []
    for index, layer in enumerate(requested):
        if not 0 <= layer < depth:
            errors.append((f"/layers/{index}", f"There is no layer {layer}: the text encoder has 0 to {depth - 1}."))
        elif layer in requested[:index]:
            errors.append((f"/layers/{index}", f"The layer {layer} is named twice."))
    Unprocessable.raise_for(errors)
    if max(requested) != last:
        raise Unprocessable.at(
            "/layers",
            f"The values of the edits were optimized for layer {last}, so it must be the last, not {max(requested)}.",
        )
    return {name: tuple(sorted(requested))}
