"""Reference images: each is stored once, by the sha256 of its re-encoded bytes."""

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import Image
from app.images.errors import ImageNotFound
from app.images.reencode import Picture
from app.storage.references import pause_collection
from app.storage.store import Store
from emender.schemas.images import ImageOut

PREFIX = "sha256:"


def add_image(session: Session, *, picture: Picture, store: Store, actor: str) -> ImageOut:
    """Store an image. An image that is stored already gets the same id and changes nothing."""
    pause_collection(session)
    sha256 = store.put(picture.content)
    row = {"sha256": sha256, "width": picture.width, "height": picture.height, "size": len(picture.content)}
    added = session.scalar(
        insert(Image).values(**row, created_by=actor).on_conflict_do_nothing().returning(Image.sha256)
    )
    if added is not None:
        record(session, actor=actor, action="image.add", target=f"image:{PREFIX}{sha256}", details=row)
    return get_image(session, image_id=PREFIX + sha256)


def get_image(session: Session, *, image_id: str) -> ImageOut:
    row = session.get(Image, image_id.removeprefix(PREFIX))
    if row is None:
        raise ImageNotFound(image_id)
    return ImageOut(
        id=PREFIX + row.sha256,
        width=row.width,
        height=row.height,
        size=row.size,
        created_by=row.created_by,
        created_at=row.created_at,
    )


def read_image(session: Session, *, image_id: str, store: Store) -> bytes:
    """Return the verified PNG. Raises `BlobMissing` or `BlobCorrupt` if the store is damaged."""
    return store.read(get_image(session, image_id=image_id).id.removeprefix(PREFIX))
