"""Artists' styles: prompts that mimic them (UCE, Gandikota et al., 2024), to see what erasing some does to the rest.

Held-out styles should keep their CLIP score, and their pictures should look as before: a low LPIPS between what the
base and the edited model draw at the same seeds (the paper, section 5.4).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from editing.edits import fill_template, split_template
from editing.errors import EditingError
from editing.evaluation.drawing import Progress, Sampling, draw_in_batches
from editing.evaluation.intervals import Interval
from editing.evaluation.metrics import Clip, PictureDistance
from editing.evaluation.rows import BenchmarkFile, Loaded
from editing.pipelines import EditablePipeline


@dataclass(frozen=True)
class StylePrompt:
    """One picture in the style of an artist."""

    place: str
    """The item of the file."""
    artist: str
    template: str
    seed: int

    @property
    def prompt(self) -> str:
        return fill_template(self.template, self.artist)


def load_artists(path: str | Path) -> Loaded[StylePrompt]:
    """The prompts of `artists_edit.json` (400 of 10 artists to erase) or `artists_test.json` (600 of 15 held out).

    Each is drawn at the seed that is listed with it. Templates are taken as they stand, also the one with "ofa" for
    "of a"; an artist of one name in two spellings of capitals would be two.

    Raises `TaskUnreadable` for a file of another shape, with the item.
    """
    file = BenchmarkFile(path)
    prompts = []
    for row in file.items():
        artist, template = row.text("class name"), row.text("text prompt")
        try:
            split_template(template)
        except EditingError as error:
            raise row.error(f"'text prompt': {error.detail}") from error
        prompts.append(StylePrompt(row.place, artist, template, row.seed("random seed")))
    return file.loaded(prompts)


@dataclass(frozen=True)
class StyleScores:
    """What was measured of each prompt, in their order."""

    artists: tuple[str, ...]
    base_clip: tuple[float, ...]
    edited_clip: tuple[float, ...]
    lpips: tuple[float, ...] = ()
    """Between the base's picture and the edited model's; empty where it was not measured."""

    @property
    def clip_change(self) -> float:
        """Of the mean CLIP score, relative to the base's, which must not be 0: -0.02 is a loss of 2 %."""
        return fmean(self.edited_clip) / fmean(self.base_clip) - 1

    def by_artist(self, values: Sequence[float]) -> dict[str, float]:
        """The mean of each artist's prompts."""
        of: dict[str, list[float]] = defaultdict(list)
        for artist, value in zip(self.artists, values, strict=True):
            of[artist].append(value)
        return {artist: fmean(found) for artist, found in of.items()}

    def rows(self) -> dict[str, dict[str, Interval]]:
        """The mean of the artists' means, with its interval over artists: their prompts are not independent."""

        def over_artists(values: Sequence[float]) -> Interval:
            return Interval.of(list(self.by_artist(values).values()))

        edited = {"clip": over_artists(self.edited_clip)}
        if any(self.base_clip):
            edited["clip_change"] = Interval(self.clip_change, None)
        if self.lpips:
            edited["lpips"] = over_artists(self.lpips)
        return {"base": {"clip": over_artists(self.base_clip)}, "edited": edited}


def measure_styles(
    base: EditablePipeline,
    edited: EditablePipeline,
    prompts: Sequence[StylePrompt],
    clip: Clip,
    *,
    sampling: Sampling,
    distance: PictureDistance | None = None,
    progress: Progress | None = None,
) -> StyleScores:
    """Draw every prompt with both models at its seed and compare. LPIPS is measured where a distance is given."""
    texts = [each.prompt for each in prompts]
    seeds = [each.seed for each in prompts]
    before = draw_in_batches(base, texts, seeds=seeds, sampling=sampling)
    after = draw_in_batches(edited, texts, seeds=seeds, sampling=sampling, progress=progress)
    base_clip: list[float] = []
    edited_clip: list[float] = []
    apart: list[float] = []
    for ones, others in zip(before, after, strict=True):
        asked = texts[len(base_clip) : len(base_clip) + len(ones)]
        base_clip += clip.score(ones, asked).tolist()
        edited_clip += clip.score(others, asked).tolist()
        if distance is not None:
            apart += distance(ones, others).tolist()
    artists = tuple(each.artist for each in prompts)
    return StyleScores(artists, tuple(base_clip), tuple(edited_clip), tuple(apart))
