"""Re-encode an uploaded image as PNG, with the pixels that the library reads of the same file."""

import io
from dataclasses import dataclass
from typing import BinaryIO

from anyio import CapacityLimiter, to_thread

from app.problems import ContentTooLarge, Unprocessable, UnsupportedMedia
from app.settings import Settings
from editing.errors import ImageRejected, ImageTooLarge, UnknownImageFormat
from editing.pictures.decode import decode_picture


@dataclass(frozen=True)
class Picture:
    """A PNG of 8-bit RGB without metadata, color profile or trailing bytes."""

    content: bytes
    width: int
    height: int


async def reencode_upload(file: BinaryIO, *, settings: Settings, decoders: CapacityLimiter) -> Picture:
    """Read and re-encode an uploaded file. Raises what `reencode` raises, and `ContentTooLarge` for too many bytes.

    A large image takes seconds and 300 MB: `decoders` limits how many are decoded at once. Others hold no thread.
    """
    return await to_thread.run_sync(_read, file, settings, limiter=decoders)


def _read(file: BinaryIO, settings: Settings) -> Picture:
    content = file.read(settings.max_image_bytes + 1)
    if len(content) > settings.max_image_bytes:
        raise ContentTooLarge(f"An image may have at most {settings.max_image_bytes} bytes.")
    return reencode(content, max_pixels=settings.max_image_pixels)


def reencode(content: bytes, *, max_pixels: int) -> Picture:
    """Decode a PNG, JPEG or WebP of one picture as the library does, and encode it as PNG.

    Raises `UnsupportedMedia` for other formats, `ContentTooLarge` for too many pixels before they are decoded, and
    `Unprocessable` for an animated or damaged file.
    """
    try:
        decoded = decode_picture(content, max_pixels=max_pixels)
    except ImageRejected as error:
        detail = f"The image was rejected: {error.detail}."
        match error:
            case ImageTooLarge():
                raise ContentTooLarge(detail) from None
            case UnknownImageFormat():
                raise UnsupportedMedia(detail) from None
        raise Unprocessable.at("/file", detail) from None
    encoded = io.BytesIO()
    decoded.save(encoded, format="PNG")
    return Picture(encoded.getvalue(), width=decoded.width, height=decoded.height)
