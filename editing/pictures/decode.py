"""From the bytes of a PNG, JPEG or WebP to 8-bit sRGB pixels: the only decoder of reference images. Free of torch."""

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError

from editing.errors import ImageRejected, ImageTooLarge, UnknownImageFormat

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PROFILE_BYTES = 4 * 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_END = b"\xff\xd9"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""By the orientation of EXIF."""
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_CICP_SRGB = {(1, 1), (1, 6), (1, 13), (2, 2)}  # (primaries, transfer) of H.273 that browsers show as sRGB; 2: unknown


def read_picture(path: str | Path, *, max_pixels: int | None = None) -> Image.Image:
    """Read a file as `decode_picture` does."""
    return decode_picture(Path(path).read_bytes(), max_pixels=max_pixels)


def decode_picture(content: bytes, *, max_pixels: int | None = None) -> Image.Image:
    """Decode a file of one picture to RGB as `convert_to_rgb` does, as browsers show it.

    Of a JPEG with several pictures (MPO), the first is the primary one. A JPEG may lack its end: at most an eighth of
    its rows, which libjpeg fills with gray. The texts of a PNG are skipped, so that they may have any size.

    Raises `UnknownImageFormat`; `ImageTooLarge` before pixels are decoded; and `ImageRejected` for an animated or
    damaged file.
    """
    try:
        return _decode(content, max_pixels)
    except ImageRejected:
        raise
    except Image.DecompressionBombError:
        raise ImageTooLarge(_describe_limit("the image", max_pixels)) from None
    except UnidentifiedImageError:
        raise UnknownImageFormat("the content of the file is not a PNG, JPEG or WebP image") from None
    except Exception as error:  # Pillow's readers raise many types on damaged files
        raise ImageRejected("the image is damaged and cannot be decoded: export it again") from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB of 8 bits in sRGB: turned as its EXIF says, on white, without metadata.

    A profile that does not fit the pixels is ignored. Gray of 16 bits is scaled to 8. CMYK without a profile is
    converted as browsers do. Raises Pillow's errors for a damaged file, and
    `ImageRejected` for floating-point pixels.
    """
    picture = _convert(image)
    return _drop_metadata(picture.copy() if picture is image else picture)


def _convert(image: Image.Image) -> Image.Image:
    """Return the picture of `convert_to_rgb`, which is `image` itself if there is nothing to convert.

    A picture of 40 megapixels takes 160 MB in each mode but gray: as few copies as possible are alive at a time.
    """
    turn, profile = _TURNS.get(_read_orientation(image)), image.info.get("icc_profile")
    image.load()
    if image.mode == "F":
        raise ImageRejected("the image has floating-point pixels: convert it to 8 bits")
    if image.mode.startswith("I"):
        image = _scale_to_8_bits(image)
    hidden = None
    if image.has_transparency_data:
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("LA" if image.mode in ("L", "La") else "RGBA")
        hidden = ImageChops.invert(image.getchannel("A"))
        image = image.convert(image.mode.removesuffix("A"))
    picture = _convert_to_srgb(image, profile)
    if hidden is not None:
        picture.paste("white", mask=hidden)
    return picture if turn is None else picture.transpose(turn)


def _drop_metadata(picture: Image.Image) -> Image.Image:
    picture.info.clear()  # an encoder would write the profile and the texts found there
    with suppress(Exception):  # damaged EXIF data
        picture.getexif().clear()
    return picture


def _decode(content: bytes, max_pixels: int | None) -> Image.Image:
    content, info = _strip_png(content) if content.startswith(_PNG) else (content, {})
    with _open(content) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ImageTooLarge(_describe_limit(f"the image of {image.width} × {image.height} pixels", max_pixels))
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise ImageRejected("the image is animated: use one frame of it")
        image.info.update(info)
        try:
            return _drop_metadata(_convert(image))
        except OSError:
            if image.format not in ("JPEG", "MPO"):
                raise
    return _drop_metadata(_convert(_open_cut_jpeg(content)))


def _open(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller limits the number of pixels
        return Image.open(io.BytesIO(content), formats=FORMATS)


def _open_cut_jpeg(content: bytes) -> Image.Image:
    """Open a JPEG without its end. Raises `ImageRejected` if more than its last eighth is missing.

    It is decoded twice, with different bytes in place of the missing ones: rows that differ are missing.
    """
    content = content.rstrip(b"\xff")
    image, other = _open(content + _JPEG_END), _open(content + b"\x55\xa6" * 512 + _JPEG_END)
    if difference := ImageChops.difference(image, other).getbbox(alpha_only=False):
        missing = image.height - difference[1]
        if missing > max(17, image.height // 8):  # a row of blocks, and the row that is interpolated with it
            raise ImageRejected(f"the file is cut off: the last {missing} of {image.height} rows are missing")
    return image


def _strip_png(content: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a PNG without texts and color profile, which Pillow limits to 1 MiB, and what Pillow is to know of it."""
    kept: list[bytes] = [_PNG]
    info: dict[str, Any] = {}
    bits, color_type = content[24:25], content[25:26]
    for kind, chunk in _iterate_chunks(content):
        if kind == b"iCCP":
            info["icc_profile"] = _inflate_profile(chunk)
        elif kind == b"cICP" and tuple(chunk[8:10]) not in _CICP_SRGB:
            raise ImageRejected("the PNG has the color space of a cICP chunk, which is not supported: save it as sRGB")
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(chunk)
        # Pillow scales the pixels to 8 bits, but not the transparent color.
        if kind == b"tRNS" and color_type == b"\0" and bits in (b"\2", b"\4"):
            info["transparency"] = int.from_bytes(chunk[8:10]) * 255 // (2 ** bits[0] - 1)
        elif kind == b"tRNS" and color_type == b"\2" and bits == b"\x10":
            info["transparency"] = (chunk[8], chunk[10], chunk[12])
    return b"".join(kept), info


def _iterate_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type and the whole of each chunk of a PNG, the last one up to the end of the file."""
    start = len(_PNG)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])  # length, type, data, checksum
        kind = content[start + 4 : start + 8]
        yield kind, content[start:end]
        if kind == b"IEND":
            return
        start = end


def _inflate_profile(chunk: bytes) -> bytes | None:
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(chunk[8:-4].partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    if inflate.unconsumed_tail:
        raise ImageRejected(f"the color profile has more than {MAX_PROFILE_BYTES} bytes: convert the image to sRGB")
    return profile


def _read_orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data say nothing
        return None


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray of 16 bits to "L", or to "LA" if one level is transparent."""
    scaled = image.point(lambda level: level * (1 / 257) + 0.5).convert("L")
    if (transparent := image.info.get("transparency")) is not None:
        opaque = (numpy.asarray(image) != transparent).astype(numpy.uint8) * 255
        scaled.putalpha(Image.fromarray(opaque))
    return scaled


def _convert_to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = _PROFILE_MODES.get(source.profile.xcolor_space.strip())
            if mode == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            if mode == image.mode:
                converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
                assert converted is not None  # which it is only for a conversion in place
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # browsers ignore a damaged profile too
    return image if image.mode == "RGB" else image.convert("RGB")


def _describe_limit(subject: str, max_pixels: int | None) -> str:
    return f"{subject} has more than the limit of {max_pixels or Image.MAX_IMAGE_PIXELS} pixels: scale it down"
