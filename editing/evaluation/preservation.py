"""Preservation: CLIP score and FID on captions that are unrelated to the edits, such as COCO's.

The paper's figures (Tables 4 and 6) are for 30,000 captions of COCO, with FID against its photographs. Captions come
from any file that `editing.captions` reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from editing.captions import read_captions
from editing.errors import ImageRejected, TaskUnreadable
from editing.evaluation.drawing import Progress, Sampling, draw_in_batches
from editing.evaluation.intervals import Interval
from editing.evaluation.metrics import Clip, FeatureExtractor, FeatureMoments, compute_frechet_distance
from editing.pictures.decode import read_picture
from editing.pipelines import EditablePipeline

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_BATCH = 32


def load_captions(path: str | Path, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """Read the first `limit` captions of a file, or all.

    Raises `CaptionsUnreadable` with the line, and `TaskUnreadable` for a file without captions.
    """
    captions = list(islice(read_captions(path, column), limit))
    if not captions:
        raise TaskUnreadable(f"{Path(path).name}: has no captions")
    return captions


def open_pictures(folder: str | Path) -> Iterator[list[Image.Image]]:
    """Yield the PNG, JPEG and WebP pictures of a folder by name, in batches. Folders inside it are not read.

    Raises `TaskUnreadable` with the file's name if one cannot be opened, and for a folder without pictures.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise TaskUnreadable(f"{folder.name}/ has no pictures ({', '.join(_SUFFIXES)})")
    for start in range(0, len(paths), _BATCH):
        yield [_open_picture(path) for path in paths[start : start + _BATCH]]


def _open_picture(path: Path) -> Image.Image:
    try:
        return read_picture(path)
    except OSError as error:
        raise TaskUnreadable(f"{path.name}: cannot be read: {error.strerror or error}") from error
    except ImageRejected as error:
        raise TaskUnreadable(f"{path.name}: {error.detail}") from error


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one model on the captions."""

    clip: tuple[float, ...]
    """The CLIP score of each caption's picture."""
    features: FeatureMoments | None = None
    """Of all pictures; None without FID."""


def measure_captions(
    pipeline: EditablePipeline,
    captions: Sequence[str],
    clip: Clip,
    *,
    seed: int = 0,
    sampling: Sampling,
    extract: FeatureExtractor | None = None,
    progress: Progress | None = None,
) -> CaptionScores:
    """Draw each caption once, the first with `seed`, the next with `seed + 1` and so on."""
    seeds = range(seed, seed + len(captions))
    scores: list[float] = []
    features = []
    for pictures in draw_in_batches(pipeline, captions, seeds=seeds, sampling=sampling, progress=progress):
        scores += clip.score(pictures, captions[len(scores) : len(scores) + len(pictures)]).tolist()
        if extract is not None:
            features.append(extract(pictures))
    return CaptionScores(tuple(scores), FeatureMoments.from_batches(features) if extract is not None else None)


def compare_captions(
    base: CaptionScores, edited: CaptionScores, *, photographs: FeatureMoments | None = None
) -> dict[str, dict[str, Interval]]:
    """Return the rows of both models.

    "clip" is the CLIP score, and "fid" the FID against the photographs, as papers report it. "fid_base" is that
    of the edited model's pictures against the base's. It is 0 if the edits changed nothing.
    """
    rows = {"base": {"clip": Interval.of(base.clip)}, "edited": {"clip": Interval.of(edited.clip)}}
    if base.features is not None and edited.features is not None:
        rows["edited"]["fid_base"] = Interval(compute_frechet_distance(edited.features, base.features), None)
        if photographs is not None:
            rows["base"]["fid"] = Interval(compute_frechet_distance(base.features, photographs), None)
            rows["edited"]["fid"] = Interval(compute_frechet_distance(edited.features, photographs), None)
    return rows
