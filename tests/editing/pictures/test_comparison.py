"""A comparison draws every prompt before and after an edit."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from editing.pictures.comparison import draw_comparison
from editing.pictures.draw import draw_pictures
from editing.pictures.grid import GridRow, draw_grid
from editing.pipelines import EditablePipeline
from editing.stage_two.update import Update, apply_temporarily

PROMPTS, CONTROLS, SEEDS = ("a cat", "the old tree"), ("a fish",), (5, 6)


class TestDrawComparison:
    def test_left_pictures_are_before_and_right_pictures_after_the_edit(
        self, pipeline: EditablePipeline, update: Update
    ) -> None:
        def draw_rows(prompts: tuple[str, ...]) -> list[list[Image.Image]]:
            return [draw_pictures(pipeline, [prompt] * 2, seeds=SEEDS, num_inference_steps=2) for prompt in prompts]

        before = draw_rows(PROMPTS + CONTROLS)
        with apply_temporarily(pipeline.encoder, update):
            after = draw_rows(PROMPTS + CONTROLS)
        assert before[0] != after[0]
        rows = [GridRow(*row) for row in zip(PROMPTS + CONTROLS, ("",) * 3, before, after, strict=True)]
        expected = draw_grid("fox to owl", [("Edited", rows[:2]), ("Controls", rows[2:])])
        drawn = draw_comparison(
            pipeline,
            apply_temporarily(pipeline.encoder, update),
            title="fox to owl",
            prompts=PROMPTS,
            controls=CONTROLS,
            seeds=SEEDS,
            num_inference_steps=2,
        )
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))
        assert draw_rows(PROMPTS[:1])[0] == before[0]  # the pipeline is as it was

    def test_without_controls_the_grid_has_one_section(self, pipeline: EditablePipeline, update: Update) -> None:
        row = draw_pictures(pipeline, ["a cat"], seeds=(5,), num_inference_steps=1)
        with apply_temporarily(pipeline.encoder, update):
            edited_row = draw_pictures(pipeline, ["a cat"], seeds=(5,), num_inference_steps=1)
        edited = apply_temporarily(pipeline.encoder, update)
        drawn = draw_comparison(pipeline, edited, title="t", prompts=["a cat"], seeds=(5,), num_inference_steps=1)
        assert drawn == draw_grid("t", [("Edited", [GridRow("a cat", "", row, edited_row)])])

    def test_progress_counts_pictures_and_may_stop_the_drawing(self, pipeline: EditablePipeline) -> None:
        calls: list[tuple[int, int]] = []
        entered: list[bool] = []

        @contextmanager
        def edited() -> Iterator[None]:
            entered.append(True)
            yield
            entered.append(False)

        def draw(stop_at: int) -> None:
            def report(done: int, total: int) -> None:
                calls.append((done, total))
                if done == stop_at:
                    raise InterruptedError

            draw_comparison(
                pipeline,
                edited(),
                title="",
                prompts=PROMPTS,
                controls=CONTROLS,
                seeds=SEEDS,
                num_inference_steps=1,
                progress=report,
            )

        draw(stop_at=-1)
        assert calls == [(done, 12) for done in (0, 2, 4, 6, 8, 10)]
        assert entered == [True, False]
        with pytest.raises(InterruptedError):
            draw(stop_at=2)
        assert entered == [True, False]  # it stopped before the edit
