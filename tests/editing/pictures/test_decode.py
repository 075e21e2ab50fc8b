"""Each kind of picture is decoded to the pixels that browsers show, within one level."""

import io
import struct
import zlib
from typing import Any

import numpy
import pytest
from PIL import Image, PngImagePlugin

from editing.errors import ImageRejected, ImageTooLarge, UnknownImageFormat
from editing.pictures.decode import convert_to_rgb, decode_picture, read_picture

EXACT: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
"""The options of each format that keep the pixels."""
RED = (200, 30, 30)
RED_IN_P3 = (184, 50, 41)  # the same color in Display P3
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))  # columns, D50


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def build_profile(space: bytes, colorants: tuple[tuple[float, ...], ...] = (), gamma: float | None = None) -> bytes:
    """Build an ICC profile of version 2: colorants with the curve of sRGB, or gray with a gamma."""

    def fixed(*numbers: float) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

    levels = numpy.linspace(0, 1, 1024)
    linear = numpy.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    if gamma is None:
        curve = b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *(linear * 65535).round().astype(int))
    else:
        curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = [(b"wtpt", b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.82491))]
    if colorants:
        tags += [
            (name + b"XYZ", b"XYZ " + bytes(4) + fixed(*xyz))
            for name, xyz in zip((b"r", b"g", b"b"), colorants, strict=True)
        ]
        tags += [(name + b"TRC", curve) for name in (b"r", b"g", b"b")]
    else:
        tags.append((b"kTRC", curve))
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content
    header = bytes(4) + bytes(4) + b"\2\x40\0\0" + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += fixed(0.9642, 1, 0.82491)
    body = header.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(body)) + body[4:]


def build_png(
    bits: int, color_type: int, rows: list[bytes], *, width: int, chunks: dict[bytes, bytes] | None = None
) -> bytes:
    """Build a PNG of a depth that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0)
    extra = b"".join(chunk(kind, data) for kind, data in (chunks or {}).items())
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def read_pixels(content: bytes) -> Any:
    picture = decode_picture(content)
    assert picture.mode == "RGB"
    assert picture.info == {}
    assert dict(picture.getexif()) == {}
    return numpy.asarray(picture).astype(int)


def assert_pixels(content: bytes, expected: Any) -> None:
    pixels = read_pixels(content)
    assert numpy.abs(pixels - numpy.broadcast_to(expected, pixels.shape)).max() <= 1, pixels


class TestColors:
    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
    def test_profile_is_converted_to_srgb(self, form: str) -> None:
        image = Image.new("RGB", (16, 16), RED_IN_P3)
        content = encode(image, form, icc_profile=build_profile(b"RGB ", DISPLAY_P3), **EXACT[form])
        assert_pixels(content, RED)

    def test_profile_of_a_palette_and_of_transparency_is_converted(self) -> None:
        profile = build_profile(b"RGB ", DISPLAY_P3)
        image = Image.new("RGBA", (4, 4), (*RED_IN_P3, 255))
        image.putpixel((0, 0), (0, 0, 0, 0))
        expected = numpy.full((4, 4, 3), RED)
        expected[0, 0] = 255
        assert_pixels(encode(image, icc_profile=profile), expected)
        palette = Image.new("RGB", (4, 4), RED_IN_P3).quantize(2)
        assert_pixels(encode(palette, icc_profile=profile), RED)

    def test_gray_with_a_profile_of_gray_or_rgb_is_converted(self) -> None:
        linear = encode(Image.new("L", (4, 4), 55), icc_profile=build_profile(b"GRAY", gamma=1.0))
        assert_pixels(linear, 128)
        assert_pixels(encode(Image.new("L", (4, 4), 55), icc_profile=build_profile(b"RGB ", DISPLAY_P3)), 55)

    def test_profile_larger_than_a_mebibyte_is_converted(self) -> None:
        profile = build_profile(b"RGB ", DISPLAY_P3) + bytes(2 * 2**20)
        assert_pixels(encode(Image.new("RGB", (4, 4), RED_IN_P3), icc_profile=profile), RED)
        with pytest.raises(ImageRejected, match="color profile has more than"):
            decode_picture(encode(Image.new("RGB", (4, 4)), icc_profile=bytes(5 * 2**20)))

    @pytest.mark.parametrize("profile", [b"no profile", build_profile(b"GRAY", gamma=1.0)])
    def test_profile_that_does_not_fit_is_ignored(self, profile: bytes) -> None:
        assert_pixels(encode(Image.new("RGB", (4, 4), RED), icc_profile=profile), RED)

    def test_color_space_that_cannot_be_converted_is_refused(self) -> None:
        def build(code: bytes) -> bytes:
            return build_png(8, 2, [bytes(RED)], width=1, chunks={b"cICP": code})

        assert_pixels(build(b"\1\x0d\0\1"), RED)  # sRGB
        with pytest.raises(ImageRejected, match="cICP"):
            decode_picture(build(b"\x09\x10\0\1"))  # BT.2100 PQ

    def test_cmyk_is_converted(self) -> None:
        image = Image.new("CMYK", (16, 16), (0, 217, 217, 55))
        expected = (200, 30, 30)
        assert_pixels(encode(image, "JPEG", quality=100, subsampling=0), expected)
        ignored = build_profile(b"RGB ", DISPLAY_P3)
        assert_pixels(encode(image, "JPEG", quality=100, subsampling=0, icc_profile=ignored), expected)


class TestDepths:
    def test_gray_of_16_bits_is_scaled(self) -> None:
        levels = numpy.linspace(0, 65535, 64).astype(numpy.uint16)
        content = encode(Image.fromarray(numpy.tile(levels, (4, 1))))
        assert_pixels(content, (levels / 257)[None, :, None])

    def test_color_of_16_bits_is_scaled(self) -> None:
        row = struct.pack(">6H", 10000, 20000, 30000, 65535, 0, 257)
        assert_pixels(build_png(16, 2, [row], width=2), numpy.array([[[39, 78, 117], [255, 0, 1]]]))

    def test_gray_and_alpha_of_16_bits_are_scaled(self) -> None:
        row = struct.pack(">4H", 0, 65535, 0, 32768)
        assert_pixels(build_png(16, 4, [row], width=2), numpy.array([[[0] * 3, [127] * 3]]))

    def test_picture_of_two_levels_is_converted(self) -> None:
        image = Image.new("1", (2, 1))
        image.putpixel((1, 0), 1)
        assert_pixels(encode(image), numpy.array([[[0] * 3, [255] * 3]]))

    def test_floating_point_pixels_are_refused(self) -> None:
        with pytest.raises(ImageRejected, match="floating-point"):
            convert_to_rgb(Image.new("F", (2, 2)))


class TestTransparency:
    @pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255), (255, 255, 255)])
    @pytest.mark.parametrize("form", ["PNG", "WEBP"])
    def test_hidden_color_is_white(self, hidden: tuple[int, int, int], form: str) -> None:
        image = Image.new("RGBA", (8, 8), (*hidden, 0))
        image.paste((*RED, 255), (2, 2, 6, 6))
        expected = numpy.full((8, 8, 3), 255)
        expected[2:6, 2:6] = RED
        assert_pixels(encode(image, form, **EXACT[form]), expected)

    def test_half_transparent_pixels_are_mixed_with_white(self) -> None:
        assert_pixels(encode(Image.new("RGBA", (4, 4), (*RED, 128))), (227, 142, 142))
        assert_pixels(encode(Image.new("LA", (4, 4), (0, 128))), 127)

    def test_transparent_palette_entry_is_white(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, 0, 0, 255])
        image.putpixel((1, 0), 1)
        assert_pixels(encode(image, transparency=1), numpy.array([[RED, [255] * 3]]))
        assert_pixels(encode(image, transparency=bytes([128, 0])), numpy.array([[(227, 142, 142), [255] * 3]]))

    @pytest.mark.parametrize(
        ("bits", "color_type", "row", "key", "expected"),
        [
            (2, 0, b"\x40", (1,), [255, 0]),
            (4, 0, b"\x5a", (5,), [255, 170]),
            (8, 0, b"\x64\x65", (100,), [255, 101]),
            (16, 0, struct.pack(">2H", 1000, 40000), (1000,), [255, 156]),
            (8, 2, b"\1\2\3\x65\x65\x65", (1, 2, 3), [255, 101]),
            (16, 2, struct.pack(">6H", 1, 2, 3, 40000, 40000, 40000), (1, 2, 3), [255, 156]),
        ],
    )
    def test_transparent_color_is_white(
        self, bits: int, color_type: int, row: bytes, key: tuple[int, ...], expected: list[int]
    ) -> None:
        content = build_png(bits, color_type, [row], width=2, chunks={b"tRNS": struct.pack(f">{len(key)}H", *key)})
        assert_pixels(content, numpy.array(expected)[None, :, None])


class TestMetadata:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
    def test_orientation_is_applied(self, orientation: int, form: str) -> None:
        upright = Image.new("RGB", (48, 32), "white")
        upright.paste("black", (0, 0, 16, 16))  # the upper left corner
        undo = {
            2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }  # fmt: skip
        stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert_pixels(encode(stored, form, exif=exif, **EXACT[form]), numpy.asarray(upright).astype(int))

    def test_damaged_exif_is_ignored(self) -> None:
        content = encode(Image.new("RGB", (4, 4), RED), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12")
        assert_pixels(content, RED)

    def test_large_texts_of_a_png_are_skipped(self) -> None:
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", "x" * 1_200_000, zip=True)
        texts.add_text("Comment", "y" * 2_000_000, zip=True)
        texts.add_text("Plain", "z" * 1_200_000)
        assert_pixels(encode(Image.new("RGB", (4, 4), RED), pnginfo=texts), RED)

    def test_callers_image_is_unchanged(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.open(io.BytesIO(encode(Image.new("RGB", (4, 2), RED), exif=exif, dpi=(72, 72))))
        assert convert_to_rgb(image).size == convert_to_rgb(image).size == (2, 4)
        assert "dpi" in image.info and image.size == (4, 2)


class TestFrames:
    def test_primary_picture_of_several_is_read(self) -> None:
        second = Image.new("RGB", (16, 16), "blue")
        content = encode(
            Image.new("RGB", (32, 16), RED), "MPO", save_all=True, append_images=[second], quality=100, subsampling=0
        )
        assert_pixels(content, RED)
        assert decode_picture(content).size == (32, 16)

    @pytest.mark.parametrize("form", ["PNG", "WEBP"])
    def test_animation_is_refused(self, form: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        with pytest.raises(ImageRejected, match="animated"):
            decode_picture(encode(frames[0], form, save_all=True, append_images=frames[1:]))


class TestDamage:
    @pytest.fixture
    def photo(self) -> Image.Image:
        return Image.effect_noise((64, 128), 80).convert("RGB")

    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_jpeg_without_end_marker_is_read(self, photo: Image.Image, progressive: bool, mode: str) -> None:
        content = encode(photo.convert(mode), "JPEG", progressive=progressive)
        assert content.endswith(b"\xff\xd9")
        for missing in (1, 2):
            assert (read_pixels(content[:-missing]) == read_pixels(content)).all()

    def test_jpeg_without_its_last_rows_is_read(self, photo: Image.Image) -> None:
        content = encode(photo, "JPEG")
        pixels = read_pixels(content[: -len(content) // 20])
        assert (pixels[:104] == read_pixels(content)[:104]).all()

    @pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
    def test_jpeg_without_much_of_its_rows_is_refused(self, photo: Image.Image, share: float) -> None:
        content = encode(photo, "JPEG")
        with pytest.raises(ImageRejected, match=r"cut off: the last \d+ of 128 rows are missing"):
            decode_picture(content[: int(len(content) * share)])

    @pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
    def test_other_cuts_are_refused(self, photo: Image.Image, form: str) -> None:
        for length in (16, 40, 100, 300 if form == "JPEG" else 3000):
            with pytest.raises(ImageRejected) as refused:
                decode_picture(encode(photo, form)[:length])
            assert "0x" not in refused.value.detail and "BytesIO" not in refused.value.detail

    def test_png_without_end_chunk_is_read(self) -> None:
        assert_pixels(encode(Image.new("RGB", (4, 4), RED))[:-12], RED)


class TestLimits:
    @pytest.mark.parametrize("content", [b"", b"GIF89a", b"<svg/>", encode(Image.new("RGB", (4, 4)), "TIFF")])
    def test_other_formats_are_refused(self, content: bytes) -> None:
        with pytest.raises(UnknownImageFormat, match="not a PNG, JPEG or WebP"):
            decode_picture(content)

    def test_pixels_are_counted_before_they_are_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
        with pytest.raises(ImageTooLarge, match="20 × 30 pixels has more than the limit of 599"):
            decode_picture(encode(Image.new("RGB", (20, 30))), max_pixels=599)
        with pytest.raises(ImageTooLarge):
            decode_picture(build_png(1, 0, [b"\0"], width=2**31 - 1))


def test_file_is_read_as_its_bytes_are(tmp_path: Any) -> None:
    content = encode(Image.new("RGBA", (4, 4), (*RED, 128)))
    (tmp_path / "a.png").write_bytes(content)
    assert read_picture(tmp_path / "a.png") == decode_picture(content)
