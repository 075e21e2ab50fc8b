"""Draw many prompts without keeping the pictures: they come in batches, and a metric reads each as it comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline

_BATCH = 32

Progress = Callable[[int, int], None]
"""Called with the pictures drawn so far by one model, and all that it shall draw at one seed."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: solver steps, and the scale of classifier-free guidance."""

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
    """The pictures of prompts in their order, each from its own seed."""
    for start in range(0, len(prompts), _BATCH):
        part = slice(start, start + _BATCH)
        pictures = draw_pictures(
            pipeline,
            prompts[part],
            seeds=seeds[part],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
        )
        if progress is not None:
            progress(start + len(pictures), len(prompts))
        yield pictures
