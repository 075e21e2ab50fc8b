"""Select and check the edits of a checkpoint.

They are ordered by creation, that is by id, so equal sets give equal checkpoints. Sources that differ only in case and
spaces are the same source, as they are for the tokenizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from sqlalchemy.orm import Session

from app.checkpoints import queries
from app.db.models import Checkpoint, Edit, Model
from app.problems import Unprocessable
from editing.stage_two.conflicts import find_declared_conflicts, normalize_source
from emender.schemas.checkpoints import UCE_METHODS, ApplyCreate, ConflictOut


@dataclass(frozen=True)
class Selection:
    edits: tuple[Edit, ...]
    methods: Mapping[UUID, str]
    """The method that writes each edit."""
    superseded: tuple[UUID, ...]
    """Edits left out because another one has the same source: older ready ones, or ones that `add` replaces."""
    layers: Mapping[str, int]
    """The layer that all values were optimized for, by text encoder. Empty if no edit is written into one."""

    def written_by(self, method: str) -> list[Edit]:
        return [edit for edit in self.edits if self.methods[edit.id] == method]


def select_edits(session: Session, *, model: Model, request: ApplyCreate, start: Checkpoint | None) -> Selection:
    """Return the edits that the request names. `start` is the checkpoint that its `from` names.

    Raises `Unprocessable` with a pointer to each id that is unknown, of another model, not ready, repeated, not in
    `start` though it is to be removed, or that the method cannot write.
    """
    kept_methods: Mapping[UUID, str] = {}
    superseded: list[Edit] = []
    pointers: dict[UUID, str] = {}
    if request.edits == "ready":
        ready = queries.ready_edits(session, model_id=model.id)
        newest = {normalize_source(edit.source): edit for edit in ready}  # the last one of each source is the newest
        chosen = {edit.id: edit for edit in newest.values()}
        superseded = [edit for edit in ready if edit.id not in chosen]
        if not chosen:
            raise Unprocessable.at("/edits", f"The model {model.name!r} has no ready edit.")
    elif start is None:
        chosen, pointers = _find_named(session, model=model, ids=request.edits, field="edits")
    else:
        kept = {edit.id: edit for edit in queries.list_edits(session, checkpoint_id=start.id)}
        kept_methods = queries.edit_methods(session, checkpoint_id=start.id)
        for edit_id in _check_removed(request.remove, kept, start):
            del kept[edit_id]
        added, pointers = _find_named(session, model=model, ids=request.add, field="add")
        sources = {normalize_source(edit.source) for edit in added.values()}
        superseded = [e for e in kept.values() if normalize_source(e.source) in sources and e.id not in added]
        for edit in superseded:
            del kept[edit.id]
        chosen = kept | added
        kept_methods = {edit_id: method for edit_id, method in kept_methods.items() if edit_id not in added}
        if not chosen:
            raise Unprocessable.at("/remove", "This would remove every edit; a checkpoint needs at least one.")
    selection = Selection(
        edits=tuple(chosen[edit_id] for edit_id in sorted(chosen)),
        methods={edit_id: kept_methods.get(edit_id, request.method) for edit_id in chosen},
        superseded=tuple(edit.id for edit in superseded),
        layers={},
    )
    _check_destinations([edit for method in UCE_METHODS for edit in selection.written_by(method)], pointers)
    return replace(selection, layers=_common_layers(session, selection.written_by("text_encoder"), pointers))


def declared_edit_conflicts(edits: Sequence[Edit]) -> list[ConflictOut]:
    """Return the conflicts that the prompts alone show: equal sources, and sources that are another's destination."""
    conflicts = find_declared_conflicts(
        [edit.source for edit in edits], [_destination_prompts(edit.destination) for edit in edits]
    )
    return [ConflictOut(kind=found.kind, edits=tuple(edits[i].id for i in found.edits)) for found in conflicts]


def _destination_prompts(destination: Mapping[str, object]) -> list[str]:
    balance = destination.get("balance")
    prompts = [destination.get("prompt"), destination.get("neutral"), *(balance if isinstance(balance, dict) else ())]
    return [str(prompt) for prompt in prompts if prompt]


def _find_named(
    session: Session, *, model: Model, ids: Sequence[str], field: str
) -> tuple[dict[UUID, Edit], dict[UUID, str]]:
    """Return the edits of these ids, and the pointer at which the request names each."""
    parsed = [_parse_id(text) for text in ids]
    found = queries.edits_by_id(session, ids=filter(None, parsed))
    chosen: dict[UUID, Edit] = {}
    pointers: dict[UUID, str] = {}
    errors = []
    for index, (text, edit_id) in enumerate(zip(ids, parsed, strict=True)):
        pointer = f"/{field}/{index}"
        edit = found.get(edit_id) if edit_id else None
        if edit is None:
            errors.append((pointer, f"There is no edit {text[:64]!r}."))
        elif edit.id in chosen:
            errors.append((pointer, f"The edit {text} is named twice; see {pointers[edit.id]}."))
        elif edit.model_id != model.id:
            errors.append((pointer, f"The edit {text} belongs to another model."))
        elif edit.state != "ready":
            hint = "wait until it is ready" if edit.state in ("queued", "optimizing") else "retry it, or leave it out"
            errors.append((pointer, f"The edit {text} is {edit.state}, not ready: {hint}."))
        else:
            chosen[edit.id] = edit
            pointers[edit.id] = pointer
    Unprocessable.raise_for(errors)
    return chosen, pointers


def _check_removed(ids: Sequence[str], kept: Mapping[UUID, Edit], start: Checkpoint) -> set[UUID]:
    """Return the edits to remove. Raises `Unprocessable` for those that `start` does not have, or has once only."""
    removed: set[UUID] = set()
    errors = []
    for index, text in enumerate(ids):
        edit_id = _parse_id(text)
        if edit_id not in kept:
            errors.append((f"/remove/{index}", f"The edit {text[:64]!r} is not in {start.version}."))
        elif edit_id in removed:
            errors.append((f"/remove/{index}", f"The edit {text} is named twice."))
        elif edit_id is not None:
            removed.add(edit_id)
    Unprocessable.raise_for(errors)
    return removed


def _check_destinations(edits: Iterable[Edit], pointers: Mapping[UUID, str]) -> None:
    """Refuse reference images for UCE, which uses the text of destinations."""
    why = "has reference images, which have no text for this method"
    hint = 'Leave it out, or apply it with the method "text_encoder".'
    unusable = [edit.id for edit in edits if "images" in edit.destination]
    Unprocessable.raise_for([(pointers.get(id, "/edits"), f"The edit {id} {why}. {hint}") for id in unusable])


def _common_layers(session: Session, edits: Sequence[Edit], pointers: Mapping[UUID, str]) -> dict[str, int]:
    """Return the layers that the values were optimized for. One update of several layers ends at one of them."""
    layers = queries.value_layers(session, ids=[edit.id for edit in edits])
    if not edits:
        return {}
    first = layers[edits[0].id]
    errors = []
    for edit in edits:
        if layers[edit.id] != first:
            detail = (
                f"The edit {edit.id} was optimized for layer {_join(layers[edit.id])}, others for {_join(first)}: "
                "apply them separately, or optimize it again with the same settings.layer."
            )
            errors.append((pointers.get(edit.id, "/edits"), detail))
    Unprocessable.raise_for(errors)
    return first


def _join(layers: Mapping[str, int]) -> str:
    return " and ".join(map(str, layers.values()))


def _parse_id(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
