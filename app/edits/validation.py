"""Check edits before a worker sees them. Free of torch."""

from collections.abc import Mapping, Sequence

from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import Image as ImageRow
from app.db.models import Model
from app.models.queries import family_of
from app.problems import Unprocessable
from editing.edits import parse_edit
from editing.errors import EditingError
from editing.families.layout import find_last_value_layer
from editing.prompts import PromptTokenizer, validate_edit
from emender.schemas.common import FieldError
from emender.schemas.edits import EditCreate

MAX_ERRORS = 100
PICTURE = Image.new("RGB", (1, 1))  # instead of reference images, which were checked when they were uploaded


def check_edits(
    session: Session, *, model: Model, edits: Mapping[str, EditCreate], tokenizers: Sequence[PromptTokenizer]
) -> None:
    """Raise `Unprocessable` with the first error of each edit. The keys of `edits` are their pointers in the body."""
    errors = []
    images = {}
    for pointer, edit in edits.items():
        destination, settings = edit.destination.model_dump(exclude_none=True), edit.settings.model_dump()
        try:
            concept = parse_edit(
                source=edit.source,
                destination=destination,
                templates=edit.templates,
                settings=settings,
                read_image=lambda _: PICTURE,
            )
            validate_edit(concept, tokenizers)
        except EditingError as error:
            errors.append(FieldError(pointer=pointer + error.pointer, detail=error.detail))
            continue
        if (layer := edit.settings.layer) is not None:
            last = find_last_value_layer(family_of(model).encoders[0], layers=model.encoders[0]["layers"])
            if len(model.encoders) > 1 or layer > last:
                detail = f"values can be optimized for the layers 0 to {last} of the model's text encoder"
                if len(model.encoders) > 1:
                    detail = "the model has several text encoders with layers of their own: omit the layer"
                errors.append(FieldError(pointer=pointer + "/settings/layer", detail=detail))
        for index, image in enumerate(edit.destination.images or ()):
            images[f"{pointer}/destination/images/{index}"] = image.removeprefix("sha256:")
    if images:
        known = set(session.scalars(select(ImageRow.sha256).where(ImageRow.sha256.in_(images.values()))))
        missing = [pointer for pointer, image in images.items() if image not in known]
        errors += [FieldError(pointer=pointer, detail="there is no such image; upload it first") for pointer in missing]
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        detail = f"The request was rejected: {errors[0].pointer}: {errors[0].detail}{more}."
        raise Unprocessable(detail, errors=errors[:MAX_ERRORS])
