"""Read edits from the database as the method takes them."""

from PIL.Image import Image

from app.db.models import Edit
from app.storage.store import Store
from editing.edits import ConceptEdit, parse_edit
from editing.pictures.decode import decode_picture


def concept_edit(edit: Edit, *, store: Store) -> ConceptEdit:
    """Return the edit of a row. Its images are read from the store and verified.

    Raises `InvalidEdit` if the row has what this version does not know, `BlobMissing` or `BlobCorrupt`.
    """

    def read_image(image_id: str) -> Image:
        return decode_picture(store.read(image_id.removeprefix("sha256:")))

    return parse_edit(
        source=edit.source,
        destination=edit.destination,
        templates=edit.templates,
        settings=edit.settings,
        read_image=read_image,
    )
