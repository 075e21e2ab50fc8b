"""Sample grids: what a stage draws, as one picture to look at while it trains."""

from pathlib import Path

from PIL import Image
from torch import Tensor

MAGNIFIED = 2


def save_grid(pictures: Tensor, path: Path, *, columns: int) -> None:
    """Save (N, 3, H, W) pictures with values in [-1, 1] as a PNG of `columns` columns, each pixel doubled."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    for index, picture in enumerate(as_bytes(pictures)):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        canvas.paste(image, (index % columns * width, index // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.resize((canvas.width * MAGNIFIED, canvas.height * MAGNIFIED), Image.Resampling.NEAREST).save(path)


def as_bytes(pictures: Tensor) -> Tensor:
    """[-1, 1] floats to uint8, rounded."""
    return (pictures.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().byte()


def as_floats(pictures: Tensor) -> Tensor:
    """uint8 to floats in [-1, 1], as the pipeline's autoencoder reads them."""
    return pictures.float() / 127.5 - 1
