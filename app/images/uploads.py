"""An uploaded file as a picture: for whoever takes uploads."""

from typing import BinaryIO

from anyio import CapacityLimiter, to_thread

from app.images.reencode import Picture, reencode
from app.problems import ContentTooLarge
from app.settings import Settings


async def read_picture(file: BinaryIO, *, settings: Settings, decoders: CapacityLimiter) -> Picture:
    """Raises what `reencode` raises, and `ContentTooLarge` for a file of too many bytes.

    A large image takes seconds and 300 MB: few are decoded at once, and those that wait hold no thread.
    """
    return await to_thread.run_sync(_read, file, settings, limiter=decoders)


def _read(file: BinaryIO, settings: Settings) -> Picture:
    content = file.read(settings.max_image_bytes + 1)
    if len(content) > settings.max_image_bytes:
        raise ContentTooLarge(f"An image may have at most {settings.max_image_bytes} bytes.")
    return reencode(content, max_pixels=settings.max_image_pixels)
