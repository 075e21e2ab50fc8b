"""From an edit's row to the `ConceptEdit` that the method takes."""

import io

from PIL import Image

from app.db.models import Edit
from app.storage.store import Store
from editing.edits import (
    Balance,
    ConceptEdit,
    Destination,
    DestinationPrompt,
    Erasure,
    ReferenceImages,
    StageOneSettings,
)
from editing.errors import InvalidEdit


def concept_edit(edit: Edit, *, store: Store) -> ConceptEdit:
    """The edit of this row; its images are read from the store and verified.

    Raises `InvalidEdit` where the row holds what this version does not know, `BlobMissing` or `BlobCorrupt`.
    """
    try:
        settings = StageOneSettings(**edit.settings)
    except TypeError as error:
        raise InvalidEdit(f"a setting that this worker does not know: {error}", pointer="/settings") from error
    return ConceptEdit(
        source=edit.source,
        destination=_destination(edit, store=store),
        templates=tuple(edit.templates),
        settings=settings,
    )


def _destination(edit: Edit, *, store: Store) -> Destination:
    match edit.destination:
        case {"prompt": str(prompt)}:
            return DestinationPrompt(prompt)
        case {"images": [*names]}:
            return ReferenceImages(tuple(_image(store.read(name.removeprefix("sha256:"))) for name in names))
        case {"erase": True, "neutral": str(neutral)}:
            return Erasure(neutral)
        case {"erase": True}:
            return Erasure()
        case {"balance": dict(weights)}:
            return Balance(weights)
        case _:
            raise InvalidEdit("a destination that this worker does not know", pointer="/destination")


def _image(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")
