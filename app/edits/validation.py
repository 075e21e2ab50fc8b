"""All that can be known to be wrong with an edit before a worker sees it. Free of torch."""

from collections.abc import Iterator, Mapping, Sequence

from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import Image as ImageRow
from app.db.models import Model
from app.problems import Unprocessable
from editing.edits import (
    Balance,
    ConceptEdit,
    Destination,
    DestinationPrompt,
    Erasure,
    ReferenceImages,
    StageOneSettings,
)
from editing.errors import EditingError
from editing.prompts import PromptTokenizer, validate_edit
from emender.schemas import edits as schemas
from emender.schemas.common import FieldError

MOST_ERRORS = 100
PICTURE = Image.new("RGB", (1, 1))  # stands for reference images, whose pixels were judged when they were uploaded


def check(
    session: Session, *, model: Model, edits: Mapping[str, schemas.EditCreate], tokenizers: Sequence[PromptTokenizer]
) -> None:
    """Raise `Unprocessable` with the first error of each edit; `edits` are by the JSON pointer of each in the body."""
    errors = list(_errors(model, edits, tokenizers)) + list(_missing_images(session, edits))
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise Unprocessable(
            f"The request was rejected: {errors[0].pointer}: {errors[0].detail}{more}.", errors=errors[:MOST_ERRORS]
        )


def _errors(
    model: Model, edits: Mapping[str, schemas.EditCreate], tokenizers: Sequence[PromptTokenizer]
) -> Iterator[FieldError]:
    layers = min(encoder["layers"] for encoder in model.encoders)
    for pointer, edit in edits.items():
        try:
            for tokenizer in tokenizers:
                validate_edit(_concept(edit), tokenizer)
        except EditingError as error:
            yield FieldError(pointer=pointer + error.pointer, detail=error.detail)
            continue
        if edit.settings.layer is not None and len(model.encoders) > 1:
            detail = "the model has several text encoders, which one layer cannot fit: leave it out"
            yield FieldError(pointer=pointer + "/settings/layer", detail=detail)
        elif edit.settings.layer is not None and edit.settings.layer >= layers:
            detail = f"the model's text encoder has the layers 0 to {layers - 1}"
            yield FieldError(pointer=pointer + "/settings/layer", detail=detail)


def _missing_images(session: Session, edits: Mapping[str, schemas.EditCreate]) -> Iterator[FieldError]:
    asked = {
        f"{pointer}/destination/images/{index}": image.removeprefix("sha256:")
        for pointer, edit in edits.items()
        for index, image in enumerate(edit.destination.images or ())
    }
    if not asked:
        return
    query = select(ImageRow.sha256).where(ImageRow.sha256.in_(set(asked.values())))
    known: Sequence[str] = session.scalars(query).all()
    for pointer, sha256 in asked.items():
        if sha256 not in known:
            yield FieldError(pointer=pointer, detail="there is no such image; upload it with POST /v1/images")


def _concept(edit: schemas.EditCreate) -> ConceptEdit:
    return ConceptEdit(
        source=edit.source,
        destination=_destination(edit.destination),
        templates=tuple(edit.templates),
        settings=StageOneSettings(**edit.settings.model_dump()),
    )


def _destination(destination: schemas.Destination) -> Destination:
    if destination.prompt is not None:
        return DestinationPrompt(destination.prompt)
    if destination.images is not None:
        return ReferenceImages((PICTURE,) * len(destination.images))
    if destination.balance is not None:
        return Balance(destination.balance)
    return Erasure(destination.neutral or "")
