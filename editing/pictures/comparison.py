"""Draw prompts with a pipeline before and after it is edited."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from PIL import Image

from editing.pictures.draw import draw_pictures
from editing.pictures.grid import GridRow, draw_grid
from editing.pipelines import EditablePipeline


def draw_comparison(
    pipeline: EditablePipeline,
    edited: AbstractContextManager[object],
    *,
    title: str,
    prompts: Sequence[str],
    controls: Sequence[str] = (),
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Draw a grid with a row for each prompt, and below them one for each control.

    `edited` keeps the pipeline edited while it is entered. `progress(done, total)` is called before each row with the
    number of pictures, and may raise.
    """
    drawn = (*prompts, *controls)
    total = 2 * len(drawn) * len(seeds)

    def draw(*, done: int) -> list[list[Image.Image]]:
        rows: list[list[Image.Image]] = []
        for number, prompt in enumerate(drawn):
            if progress:
                progress(done + number * len(seeds), total)
            row = draw_pictures(
                pipeline,
                [prompt] * len(seeds),
                seeds=seeds,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            rows.append(row)
        return rows

    before = draw(done=0)
    with edited:
        after = draw(done=total // 2)
    rows = [GridRow(prompt, "", *pictures) for prompt, *pictures in zip(drawn, before, after, strict=True)]
    sections = [("Edited", rows[: len(prompts)]), ("Controls", rows[len(prompts) :])]
    return draw_grid(title, [section for section in sections if section[1]])
