"""Re-encode an uploaded image as PNG: its format is detected by content, its size checked before it is decoded."""

import io
import warnings
from dataclasses import dataclass
from typing import BinaryIO

from anyio import CapacityLimiter, to_thread
from PIL import Image, ImageOps, UnidentifiedImageError

from app.problems import ContentTooLarge, Unprocessable, UnsupportedMedia
from app.settings import Settings

FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Picture:
    """A PNG of 8-bit RGB or RGBA without metadata, color profile or trailing bytes."""

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
    """Decode a PNG, JPEG or WebP of one frame, apply its EXIF orientation, and encode it as PNG.

    Raises `UnsupportedMedia` for other formats, `ContentTooLarge` for too many pixels before they are decoded, and
    `Unprocessable` for an animated or damaged file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the number of pixels is checked below
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ContentTooLarge(f"The image has more than {max_pixels} pixels.") from None
    except UnidentifiedImageError:
        raise UnsupportedMedia("The content of the file is not a PNG, JPEG or WebP image.") from None
    except Exception as error:  # Pillow's readers raise many types on damaged headers
        raise _damaged(error) from None
    with opened as image:
        if image.width * image.height > max_pixels:
            raise ContentTooLarge(
                f"The image has {image.width} × {image.height} pixels; the limit is {max_pixels}. Scale it down."
            )
        if getattr(image, "n_frames", 1) > 1:
            raise Unprocessable.at("/file", "The image is animated; upload one frame of it.")
        try:
            ImageOps.exif_transpose(image, in_place=True)
            mode = "RGBA" if image.has_transparency_data else "RGB"
            decoded = image if image.mode == mode else image.convert(mode)
        except Exception as error:
            raise _damaged(error) from None
        decoded.info.clear()  # the encoder would write the color profile and texts found there
        encoded = io.BytesIO()
        decoded.save(encoded, format="PNG")
        return Picture(encoded.getvalue(), width=decoded.width, height=decoded.height)


def _damaged(error: Exception) -> Unprocessable:
    return Unprocessable.at("/file", f"The image is damaged and cannot be decoded: {error}")
