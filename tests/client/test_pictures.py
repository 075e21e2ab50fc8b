"""Pictures as bytes, as PIL images, and as thumbnails in a notebook."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from emender.errors import EmenderError
from emender.pictures import THUMBNAIL_PIXELS, Picture, Pictures, encode_image


@pytest.fixture
def picture() -> Picture:
    content = BytesIO()
    Image.new("RGB", (1024, 512), "red").save(content, "PNG")
    return Picture("before <after>.png", content.getvalue())


def find_thumbnails(html: str) -> list[bytes]:
    return [b64decode(content) for content in re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)]


def test_picture_is_a_pil_image(picture: Picture) -> None:
    assert picture.image.size == (1024, 512)


def test_picture_is_saved_under_its_name(picture: Picture, tmp_path: Path) -> None:
    path = picture.save(tmp_path / "out")
    assert path == tmp_path / "out" / picture.name
    assert path.read_bytes() == picture.content


def test_saved_picture_stays_in_the_folder(tmp_path: Path) -> None:
    assert Picture("../../a.png", b"").save(tmp_path / "out") == tmp_path / "out" / "a.png"


def test_notebook_shows_a_small_thumbnail(picture: Picture) -> None:
    html = picture._repr_html_()
    (thumbnail,) = find_thumbnails(html)
    assert Image.open(BytesIO(thumbnail)).size == (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS // 2)
    assert "before &lt;after&gt;.png" in html and "<after>" not in html


def test_notebook_shows_a_thumbnail_of_each_picture(picture: Picture) -> None:
    assert len(find_thumbnails(Pictures([picture, picture])._repr_html_())) == 2
    assert Pictures()._repr_html_() == "no pictures"


def test_picture_itself_is_shown_without_pillow(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emender.pictures.find_spec", lambda _: None)
    assert find_thumbnails(picture._repr_html_()) == [picture.content]


def test_uploaded_pil_image_keeps_its_orientation_and_profile() -> None:
    exif, content = Image.Exif(), BytesIO()
    exif[0x0112], exif[0x010F] = 6, "a camera that names its owner"
    Image.new("RGB", (8, 4)).save(content, "JPEG", exif=exif, icc_profile=b"a profile")
    with Image.open(BytesIO(encode_image(Image.open(content)))) as encoded:
        assert dict(encoded.getexif()) == {0x0112: 6}
        assert encoded.info["icc_profile"] == b"a profile"


def test_pil_image_that_no_png_holds_is_refused() -> None:
    with pytest.raises(EmenderError, match="mode CMYK, which cannot be encoded as PNG"):
        encode_image(Image.new("CMYK", (4, 4)))
