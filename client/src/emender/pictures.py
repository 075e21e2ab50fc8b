"""Pictures of the service: their bytes, as PIL images, and as thumbnails in a notebook."""

from base64 import b64encode
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from emender.errors import EmenderError

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL_PIXELS = 256
_ORIENTATION = 0x0112  # of EXIF
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return Path(name).suffix.lower() in MEDIA_TYPES


@dataclass(frozen=True)
class Picture:
    """A picture as the service stores it. A notebook shows its thumbnail."""

    name: str
    content: bytes = field(repr=False)

    @property
    def image(self) -> "Image":
        """The picture as a PIL image. Needs pillow."""
        from PIL import Image

        return Image.open(BytesIO(self.content))

    def save(self, folder: Path | str) -> Path:
        """Write the picture into a folder under its name, and return its path."""
        path = Path(folder) / Path(self.name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return path

    def _repr_html_(self) -> str:
        content, media_type = self._thumbnail()
        source = f"data:{media_type};base64,{b64encode(content).decode()}"
        return (
            '<figure style="display: inline-block; margin: 4px">'
            f'<img src="{source}" alt="{escape(self.name)}" style="max-width: 100%">'
            f"<figcaption>{escape(self.name)}</figcaption></figure>"
        )

    def _thumbnail(self) -> tuple[bytes, str]:
        """Return a small PNG, or the picture itself without pillow."""
        if find_spec("PIL") is None:
            return self.content, MEDIA_TYPES.get(Path(self.name).suffix.lower(), "image/png")
        image, content = self.image, BytesIO()
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        image.save(content, "PNG")
        return content.getvalue(), "image/png"


class Pictures(tuple[Picture, ...]):
    """Pictures in order. A notebook shows their thumbnails."""

    def _repr_html_(self) -> str:
        return "".join(picture._repr_html_() for picture in self) or "no pictures"


def encode_image(image: "Image") -> bytes:
    """Encode a PIL image as PNG with its orientation and color profile, which the service applies.

    Raises `EmenderError` for a mode that no PNG has, such as CMYK.
    """
    from PIL.Image import Exif

    exif, content = Exif(), BytesIO()
    if orientation := image.getexif().get(_ORIENTATION):
        exif[_ORIENTATION] = orientation
    try:
        image.save(content, "PNG", exif=exif)
    except OSError as error:
        raise EmenderError(
            f"The image has the mode {image.mode}, which cannot be encoded as PNG.",
            next_step="Upload its file as a `Path`, or convert it to RGB first.",
        ) from error
    return content.getvalue()
