"""What the pictures show, before and after: the classifier's confidences, the figures and the picture of the demo."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from demo.check import Figures
from demo.classify import Classifier, Confidences, classify
from demo.draw import draw_pictures
from demo.edits import HELD_OUT_PROMPT, SEEDS, DemoEdit
from editing.pictures.grid import GridRow, draw_grid

Report = dict[str, Any]
SHOWN = 5  # pictures of a row
Advance = Callable[[int], None]


@dataclass(frozen=True)
class PictureRequests:
    """Prompts and seeds, pair by pair; one picture each."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[str]) -> "PictureRequests":
        """Every prompt with every seed, seed by seed."""
        pairs = [(prompt, seed) for seed in SEEDS for prompt in prompts]
        return cls(tuple(prompt for prompt, _ in pairs), tuple(seed for _, seed in pairs))


@dataclass(frozen=True)
class ClassifiedPictures:
    """The pictures of one question, (n, 3, h, w) in [-1, 1], and what the classifier says of them."""

    pictures: Tensor
    confidences: Confidences

    def concept(self, name: str) -> float:
        return float(self.confidences.of_concept(name).mean())

    def style(self, name: str) -> float:
        return float(self.confidences.of_style(name).mean())

    def images(self) -> list[Image.Image]:
        """Return the first few as pictures."""
        return as_images(self.pictures[:SHOWN])


def as_images(pictures: Tensor) -> list[Image.Image]:
    """(n, 3, h, w) in [-1, 1] as pictures."""
    pixels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture.contiguous().numpy()) for picture in pixels]


@dataclass(frozen=True)
class PipelinePictures:
    """What one pipeline draws for each edit and for each held-out concept."""

    edits: tuple[ClassifiedPictures, ...]
    held_out: dict[str, ClassifiedPictures]


def draw_results(
    pipeline: StableDiffusionPipeline,
    classifier: Classifier,
    *,
    edits: Sequence[DemoEdit],
    held_out: Sequence[str],
    advance: Advance,
) -> PipelinePictures:
    """Draw everything with one pipeline and classify it; `advance` receives the number of drawn pictures."""

    def draw_and_classify(prompts: Sequence[str]) -> ClassifiedPictures:
        requests = PictureRequests.of(prompts)
        pictures = draw_pictures(pipeline, requests.prompts, requests.seeds)
        advance(len(requests.prompts))
        return ClassifiedPictures(pictures, classify(pictures, classifier))

    pictures = tuple(draw_and_classify(edit.prompts()) for edit in edits)
    return PipelinePictures(
        pictures, _by_concept(draw_and_classify([HELD_OUT_PROMPT.format(name) for name in held_out]), held_out)
    )


def picture_count(edits: Sequence[DemoEdit], held_out: Sequence[str]) -> int:
    """How many pictures `draw_results` draws."""
    return len(SEEDS) * (sum(len(edit.prompts()) for edit in edits) + len(held_out))


def report_of(edits: Sequence[DemoEdit], *, before: PipelinePictures, after: PipelinePictures) -> Report:
    """Return the figures of `report.json` that pictures give."""
    measured = []
    for edit, then, now in zip(edits, before.edits, after.edits, strict=True):
        measure = _measure(edit, then)
        measured.append(
            {
                "source": edit.source,
                "destination": edit.destination,
                "kind": edit.kind,
                "before": measure(then),
                "after": measure(now),
            }
        )
    return {"edits": measured, "holdout": {"before": _held_out(before), "after": _held_out(after)}}


def _measure(edit: DemoEdit, before: ClassifiedPictures) -> Callable[[ClassifiedPictures], dict[str, float | None]]:
    """Return how to judge an edit's pictures by their mean confidence.

    An erased style has its own head and no destination. A word that the model misunderstands is no class of its own:
    its "source" is the concept that the base model draws for it instead.
    """
    if edit.destination is None:
        return lambda pictures: {"source": pictures.style(edit.source), "destination": None}
    destination = edit.destination
    source = edit.source
    if source not in before.confidences.classes.concepts:
        means = before.confidences.concept.mean(0).clone()
        means[before.confidences.classes.concepts.index(destination)] = -1
        source = before.confidences.classes.concepts[int(means.argmax())]
    return lambda pictures: {"source": pictures.concept(source), "destination": pictures.concept(destination)}


def _held_out(drawn: PipelinePictures) -> float:
    return mean(pictures.concept(name) for name, pictures in drawn.held_out.items())


def _by_concept(pictures: ClassifiedPictures, names: Sequence[str]) -> dict[str, ClassifiedPictures]:
    """Return the pictures of each concept, which were drawn seed by seed."""
    every = pictures.confidences
    return {
        name: ClassifiedPictures(
            pictures.pictures[index :: len(names)],
            Confidences(
                every.concept[index :: len(names)],
                every.style[index :: len(names)],
                every.gender[index :: len(names)],
                every.classes,
            ),
        )
        for index, name in enumerate(names)
    }


def save_picture(
    path: Path, edits: Sequence[DemoEdit], *, before: PipelinePictures, after: PipelinePictures, title: str
) -> None:
    """`before-after.png`: a row for each edit, then rows of held-out concepts."""
    rows: dict[str, list[GridRow]] = {}
    headings = {
        "concept": "One concept for another",
        "alias": "A word that was misunderstood",
        "images": "Shown by reference images",
        "style": "A style erased",
    }
    for edit, then, now in zip(edits, before.edits, after.edits, strict=True):
        goal = f"to {edit.destination}" if edit.destination else "erased"
        row = GridRow(edit.source, goal, then.images(), now.images())
        rows.setdefault(headings[edit.kind], []).append(row)
    names = list(before.held_out)
    untouched = []
    for start in range(0, 4 * SHOWN, SHOWN):
        chosen = names[start : start + SHOWN]
        pictures = ([drawn.held_out[name].images()[0] for name in chosen] for drawn in (before, after))
        untouched.append(GridRow("held out", ", ".join(chosen), *pictures))
    sections = [*rows.items(), ("Not edited", untouched)]
    draw_grid(title, sections).save(path)


def print_figures(report: Report, console: Console) -> None:
    """Print the confidences as a table, and what the demo is meant to show beneath it."""
    table = Table("kind", "source", "destination", "source before", "after", "destination before", "after")
    for edit in report["edits"]:
        facts = [edit["kind"], edit["source"], edit["destination"] or "(erased)"]
        for what in ("source", "destination"):
            facts += ["" if edit[when][what] is None else f"{edit[when][what]:.2f}" for when in ("before", "after")]
        table.add_row(*facts)
    console.print(table)
    figures = Figures.of(report)
    console.print(f"destination, mean rise    {figures.destinations:+.3f} over {figures.replaced} edits")
    console.print(f"erased style, change      {figures.erasure:+.3f}")
    console.print(f"held-out concepts, change {figures.holdout:+.3f} from {report['holdout']['before']:.3f}")
    check = report["check"]
    console.print(f"the service's own check   {check['succeeded']} of {check['evaluated']} evaluated edits succeeded")
    console.print(f"pulled sha256             {report['pulled']['sha256']}, as published")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())
    console.print(f"seconds                   {seconds}")
    console.print(f"peak memory               {report['peak_memory_mb']} MB, all processes together")
