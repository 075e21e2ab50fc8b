"""From an uploaded file to the PNG that we keep: sniffed by its content, judged before it is decoded, drawn afresh."""

import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from app.problems import ContentTooLarge, Unprocessable, UnsupportedMedia

FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Picture:
    """A PNG of 8-bit RGB or RGBA and nothing else: no metadata, no profile, no trailing bytes."""

    content: bytes
    width: int
    height: int


def reencode(content: bytes, *, max_pixels: int) -> Picture:
    """Decode a PNG, JPEG or WebP of one frame, turn it as its EXIF says, and encode it as PNG.

    Raises `UnsupportedMedia` for anything else, `ContentTooLarge` for too many pixels, before they are decoded, and
    `Unprocessable` for a file that is animated or cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we ask for the pixels ourselves
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ContentTooLarge(f"The image has more than {max_pixels} pixels.") from None
    except UnidentifiedImageError:
        raise UnsupportedMedia("The file is no PNG, JPEG or WebP image, whatever its name says.") from None
    except Exception as error:  # Pillow's readers raise what they like on damaged headers
        raise _damaged(error) from None
    with opened as image:
        if image.width * image.height > max_pixels:
            raise ContentTooLarge(
                f"The image has {image.width} × {image.height} pixels; at most {max_pixels} are taken. Scale it down."
            )
        if getattr(image, "n_frames", 1) > 1:
            raise Unprocessable.at("/file", "The image is animated; upload one frame of it.")
        try:
            ImageOps.exif_transpose(image, in_place=True)
            mode = "RGBA" if image.has_transparency_data else "RGB"
            drawn = image if image.mode == mode else image.convert(mode)
        except Exception as error:
            raise _damaged(error) from None
        drawn.info.clear()  # or the encoder would write the profile and texts that it finds there
        encoded = io.BytesIO()
        drawn.save(encoded, format="PNG")
        return Picture(encoded.getvalue(), width=drawn.width, height=drawn.height)


def _damaged(error: Exception) -> Unprocessable:
    return Unprocessable.at("/file", f"The image is damaged and cannot be decoded: {error}")
