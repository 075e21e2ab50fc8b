"""Win rates: the arithmetic by hand, and the measuring against pictures drawn one by one."""

from dataclasses import replace

import pytest

from editing.evaluation.contrasts import (
    Contrast,
    ContrastTask,
    WinRates,
    average_seeds,
    compute_win_rates,
    measure_contrasts,
)
from editing.evaluation.drawing import Sampling
from editing.evaluation.metrics import Clip
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=2.0)


def contrast(prompt: str, expected: str, other: str, destination_prompt: str = "") -> Contrast:
    return Contrast(prompt, expected, other, destination_prompt or expected)


CATS = ContrastTask(
    "line 2", "a cat", "a dog",
    efficacy=contrast("a cat", "a dog", "a cat", "one dog"),
    generality=(contrast("two cats", "two dogs", "two cats"), contrast("red cat", "red dog", "red cat")),
    specificity=(contrast("a fish", "a fish", "a dogfish"),),
)  # fmt: skip
BOATS = ContrastTask(
    "line 3", "a boat", "a ship",
    efficacy=contrast("a boat", "a ship", "a boat"),
    generality=(contrast("my boat", "my ship", "my boat"),),
    specificity=(contrast("a tree", "a tree", "a mast"), contrast("the sea", "the sea", "the ships")),
)  # fmt: skip


class TestWinRates:
    def test_tasks_have_equal_weights(self) -> None:
        won = [True, True, False, True] + [False, True, False, False]
        assert compute_win_rates([CATS, BOATS], won) == WinRates(
            efficacy=(1 + 0) / 2, generality=(1 / 2 + 1) / 2, specificity=(1 + 0) / 2
        )

    def test_harmonic_and_arithmetic_means(self) -> None:
        rates = WinRates(efficacy=0.9, generality=0.9, specificity=0.3)
        assert rates.f1_harmonic == pytest.approx(2 * 0.27 / 1.2)
        assert rates.f1_arithmetic == pytest.approx(0.6)
        assert WinRates(1.0, 0.0, 0.0).f1_harmonic == 0.0

    def test_arithmetic_mean_equals_the_papers_figure(self) -> None:
        """UCE on RoAD, Table 7, where the two differ most."""
        rates = WinRates(0.7822, 0.6929, 0.9209)
        assert (round(100 * rates.f1_arithmetic, 2), round(100 * rates.f1_harmonic, 2)) == (80.69, 79.08)

    def test_average_over_seeds(self) -> None:
        found = average_seeds([WinRates(0.5, 0.4, 0.8), WinRates(0.7, 0.6, 0.8)])
        assert found["efficacy"].mean == pytest.approx(0.6)
        assert found["efficacy"].ci95 == pytest.approx(12.706 * 0.1, rel=1e-4)  # t of one degree of freedom
        assert found["specificity"].ci95 == pytest.approx(0)
        assert found["f1_arithmetic"].mean == pytest.approx(0.65)
        assert average_seeds([WinRates(0.5, 0.4, 0.8)])["efficacy"].ci95 is None


class TestMeasureContrasts:
    @pytest.mark.parametrize("destination_prompts", [False, True])
    def test_every_prompt_is_drawn_with_every_seed(
        self, pipeline: EditablePipeline, clip: Clip, destination_prompts: bool
    ) -> None:
        tasks = [CATS, BOATS] * 5  # more prompts than a batch
        told: list[tuple[int, int]] = []
        found = measure_contrasts(
            pipeline,
            tasks,
            clip,
            seeds=[3, 8],
            sampling=SAMPLING,
            destination_prompts=destination_prompts,
            progress=lambda done, total: told.append((done, total)),
        )
        asked = [each for task in tasks for each in (task.efficacy, *task.generality, *task.specificity)]
        prompts = [each.destination_prompt if destination_prompts else each.prompt for each in asked]
        for rates, seed in zip(found, [3, 8], strict=True):
            pictures = draw_pictures(
                pipeline, prompts, seeds=[seed] * len(prompts), num_inference_steps=2, guidance_scale=2.0
            )
            nearness = (
                clip.embed_pictures(pictures)
                @ clip.embed_texts([text for each in asked for text in (each.expected, each.other)]).T
            )  # (prompts, 2 · prompts)
            won = [bool(row[2 * place] > row[2 * place + 1]) for place, row in enumerate(nearness)]
            assert rates == compute_win_rates(tasks, won)
            assert len(set(won)) == 2
        assert told == [(32, 40), (40, 40)] * 2

    def test_swapped_texts_swap_the_wins(self, pipeline: EditablePipeline, clip: Clip) -> None:
        def turned(each: Contrast) -> Contrast:
            return replace(each, expected=each.other, other=each.expected)

        tasks = [CATS, BOATS]
        other_way = [
            replace(
                task,
                efficacy=turned(task.efficacy),
                generality=tuple(map(turned, task.generality)),
                specificity=tuple(map(turned, task.specificity)),
            )
            for task in tasks
        ]
        (ones,) = measure_contrasts(pipeline, tasks, clip, seeds=[0], sampling=SAMPLING)
        (others,) = measure_contrasts(pipeline, other_way, clip, seeds=[0], sampling=SAMPLING)
        for name in ("efficacy", "generality", "specificity"):
            assert getattr(ones, name) + getattr(others, name) == pytest.approx(1)
