"""Draw many prompts in batches, so that a metric can read the pictures without keeping them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline

_BATCH = 32

Progress = Callable[[int, int], None]
"""Called with the number of pictures of one model and seed so far, and their total."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the solver."""

    num_inference_steps: int = 20
    guidance_scale: float = 7.5


def draw_in_batches(
    pipeline: EditablePipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    progress: Progress | None = None,
) -> Iterator[list[Image.Image]]:
    """Yield the pictures of prompts in order, each from its own seed."""
    for start in range(0, len(prompts), _BATCH):
        batch = slice(start, start + _BATCH)
        pictures = draw_pictures(
            pipeline,
            prompts[batch],
            seeds=seeds[batch],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        )
        if progress is not None:
            progress(start + len(pictures), len(prompts))
        yield pictures
