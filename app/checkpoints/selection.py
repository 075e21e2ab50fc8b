"""Which edits a checkpoint is made of: what was asked for, checked, in the one order that there is.

The order is that of the edits' creation (their ids), whatever the order asked for, so that equal sets are equal
checkpoints. Sources count as the same when they differ in case and spaces only, as they do for the tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from app.checkpoints import queries
from app.db.models import Checkpoint, Edit, Model
from app.problems import Unprocessable
from editing.stage_two.conflicts import declared_conflicts, sameness
from emender.schemas.checkpoints import ApplyCreate, ConflictOut
from emender.schemas.common import FieldError


@dataclass(frozen=True)
class Selection:
    edits: tuple[Edit, ...]
    superseded: tuple[UUID, ...]
    """Left out because another one has the same source: an older ready one, or one that `add` replaces."""
    in_cross_attention: frozenset[UUID]
    """Those that are written there; the others go into the memory."""
    layers: Mapping[str, int]
    """The layer that all values for the memory were optimised for, by text encoder; empty where there are none."""

    def method_of(self, edit: Edit) -> str:
        return "cross_attention" if edit.id in self.in_cross_attention else "text_encoder"


def select_edits(session: Session, *, model: Model, request: ApplyCreate, start: Checkpoint | None) -> Selection:
    """The edits that the request names; `start` is the checkpoint that `from` names.

    Raises `Unprocessable` with a pointer to each id that is unknown, of another model, not ready, given twice, to be
    removed from where it is not, or that the method cannot write.
    """
    stayed: Mapping[UUID, str] = {}
    superseded: list[Edit] = []
    pointers: dict[UUID, str] = {}
    if request.edits == "ready":
        ready = queries.ready_edits(session, model_id=model.id)
        newest = {sameness(edit.source): edit for edit in ready}  # oldest first, so that the newest stays
        chosen = {edit.id: edit for edit in newest.values()}
        superseded = [edit for edit in ready if edit.id not in chosen]
        if not chosen:
            raise Unprocessable.at("/edits", f"The model {model.name!r} has no edit that is ready.")
    elif start is None:
        chosen, pointers = _named(session, model=model, ids=request.edits, field="edits")
    else:
        chosen = {edit.id: edit for edit in queries.edits_in(session, checkpoint_id=start.id)}
        stayed = queries.methods_in(session, checkpoint_id=start.id)
        removed = _removed(request.remove, chosen, start)
        added, pointers = _named(session, model=model, ids=request.add, field="add")
        sources = {sameness(edit.source) for edit in added.values()}
        chosen = {edit_id: edit for edit_id, edit in chosen.items() if edit_id not in removed}
        superseded = [e for e in chosen.values() if sameness(e.source) in sources and e.id not in added]
        for edit in superseded:
            del chosen[edit.id]
        chosen |= added
        stayed = {edit_id: method for edit_id, method in stayed.items() if edit_id not in added}
        if not chosen:
            raise Unprocessable.at("/remove", "No edit would be left; a version needs at least one.")
    edits = tuple(chosen[edit_id] for edit_id in sorted(chosen))
    methods = {edit.id: stayed.get(edit.id, request.method) for edit in edits}
    in_cross_attention = frozenset(edit_id for edit_id, method in methods.items() if method == "cross_attention")
    _check_words([edit for edit in edits if edit.id in in_cross_attention], pointers)
    in_text_encoder = [edit for edit in edits if edit.id not in in_cross_attention]
    layers = _common_layers(session, in_text_encoder, pointers) if in_text_encoder else {}
    return Selection(
        edits=edits,
        superseded=tuple(edit.id for edit in superseded),
        in_cross_attention=in_cross_attention,
        layers=layers,
    )


def conflicts(edits: Sequence[Edit]) -> list[ConflictOut]:
    """What the words alone show: two edits of one source, and a source that is another edit's destination."""
    sources = [edit.source for edit in edits]
    found = declared_conflicts(sources, [_destination_names(edit.destination) for edit in edits])
    return [ConflictOut(kind=conflict.kind, edits=tuple(edits[i].id for i in conflict.edits)) for conflict in found]


def _destination_names(destination: Mapping[str, object]) -> list[str]:
    names = [destination[key] for key in ("prompt", "neutral") if destination.get(key)]
    balance = destination.get("balance")
    return [str(name) for name in (*names, *(balance if isinstance(balance, Mapping) else ()))]


def _named(
    session: Session, *, model: Model, ids: Sequence[str], field: str
) -> tuple[dict[UUID, Edit], dict[UUID, str]]:
    """The edits of these ids, and where each was named."""
    parsed = [_uuid(text) for text in ids]
    found = queries.edits_by_id(session, ids=[edit_id for edit_id in parsed if edit_id])
    chosen: dict[UUID, Edit] = {}
    pointers: dict[UUID, str] = {}
    errors = []
    for index, (text, edit_id) in enumerate(zip(ids, parsed, strict=True)):
        pointer = f"/{field}/{index}"
        edit = found.get(edit_id) if edit_id else None
        if edit is None:
            errors.append(FieldError(pointer=pointer, detail=f"There is no edit {text[:64]!r}."))
        elif edit.id in chosen:
            errors.append(
                FieldError(pointer=pointer, detail=f"The edit {text} is named twice; see {pointers[edit.id]}.")
            )
        elif edit.model_id != model.id:
            errors.append(FieldError(pointer=pointer, detail=f"The edit {text} belongs to another model."))
        elif edit.state != "ready":
            hint = "wait until it is ready" if edit.state in ("queued", "optimizing") else "retry it, or leave it out"
            errors.append(FieldError(pointer=pointer, detail=f"The edit {text} is {edit.state}, not ready: {hint}."))
        else:
            chosen[edit.id] = edit
            pointers[edit.id] = pointer
    _raise(errors)
    return chosen, pointers


def _removed(ids: Sequence[str], chosen: Mapping[UUID, Edit], start: Checkpoint) -> set[UUID]:
    removed: set[UUID] = set()
    errors = []
    for index, text in enumerate(ids):
        edit_id = _uuid(text)
        if edit_id is None or edit_id not in chosen:
            detail = f"The edit {text[:64]!r} is not in v{start.number}."
            errors.append(FieldError(pointer=f"/remove/{index}", detail=detail))
        elif edit_id in removed:
            errors.append(FieldError(pointer=f"/remove/{index}", detail=f"The edit {text} is named twice."))
        else:
            removed.add(edit_id)
    _raise(errors)
    return removed


def _check_words(edits: Sequence[Edit], pointers: Mapping[UUID, str]) -> None:
    """Cross-attention is edited by what destinations say: pictures say nothing."""
    _raise(
        [
            FieldError(
                pointer=pointers.get(edit.id, "/edits"),
                detail=f"The edit {edit.id} has reference images, which have no words for cross-attention to read: "
                'leave it out, or apply it with the method "text_encoder".',
            )
            for edit in edits
            if "images" in edit.destination
        ]
    )


def _common_layers(session: Session, edits: Sequence[Edit], pointers: Mapping[UUID, str]) -> dict[str, int]:
    """A closed form over several layers ends at one of them: the values must have been made for the same."""
    layers = queries.value_layers(session, ids=[edit.id for edit in edits])
    first = layers[edits[0].id]
    _raise(
        [
            FieldError(
                pointer=pointers.get(edit.id, "/edits"),
                detail=f"The edit {edit.id} was optimised for layer {_said(layers[edit.id])}, "
                f"others for layer {_said(first)}: "
                "apply them separately, or optimise it again with the same settings.layer.",
            )
            for edit in edits
            if layers[edit.id] != first
        ]
    )
    return first


def _said(layers: Mapping[str, int]) -> str:
    return " and ".join(map(str, layers.values()))


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _raise(errors: Sequence[FieldError]) -> None:
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Unprocessable(errors[0].detail + more, errors=errors[:100])
