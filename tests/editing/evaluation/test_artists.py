"""Styles of artists: files, and what an edit does to a pair of pipelines."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from editing.errors import TaskUnreadable
from editing.evaluation.artists import StylePrompt, StyleScores, load_artists, measure_styles
from editing.evaluation.drawing import Sampling
from editing.evaluation.metrics import Clip
from editing.evaluation.rows import Note
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline, load_pipeline

ITEM = {"class name": "Ann Ink", "text prompt": "a painting of {}", "random seed": 7, "idx": 0, "anchor": ""}


class TestLoadArtists:
    def load(self, tmp_path: Path, *items: Any) -> Any:
        path = tmp_path / "artists.json"
        path.write_text(json.dumps(items))
        return load_artists(path)

    def test_item_becomes_a_prompt(self, tmp_path: Path) -> None:
        (prompt,) = self.load(tmp_path, ITEM).tasks
        assert prompt == StylePrompt("item 1", "Ann Ink", "a painting of {}", 7)
        assert prompt.prompt == "a painting of Ann Ink"

    def test_seed_written_as_text_is_read_and_noted(self, tmp_path: Path) -> None:
        loaded = self.load(tmp_path, ITEM, ITEM | {"random seed": "12"})
        assert loaded.tasks[1].seed == 12
        assert loaded.notes == (Note("item 2", "'random seed': the text '12' read as a number"),)

    @pytest.mark.parametrize(
        ("item", "complaint"),
        [
            (ITEM | {"random seed": -1}, "artists.json, item 2: 'random seed' must be a whole number of 0 or more"),
            (ITEM | {"random seed": True}, "item 2: 'random seed' must be a whole number"),
            (ITEM | {"text prompt": "a painting"}, "item 2: 'text prompt': "),
            (ITEM | {"class name": None}, "item 2: there is no 'class name'"),
            (ITEM | {"class name": 5}, "item 2: 'class name' must be text, not int"),
            ("Ann Ink", "item 2: must be an object"),
        ],
    )
    def test_invalid_item_is_named(self, tmp_path: Path, item: Any, complaint: str) -> None:
        with pytest.raises(TaskUnreadable, match=complaint):
            self.load(tmp_path, ITEM, item)

    @pytest.mark.parametrize(("text", "complaint"), [("{", "is no JSON"), ("{}", "must be a list"), ("[]", "no tas")])
    def test_invalid_file_is_refused(self, tmp_path: Path, text: str, complaint: str) -> None:
        (tmp_path / "artists.json").write_text(text)
        with pytest.raises(TaskUnreadable, match=f"artists.json: .*{complaint}"):
            load_artists(tmp_path / "artists.json")

    def test_published_files(self, shared: Callable[[str], Path]) -> None:
        for name, prompts, artists in (("artists_edit.json", 400, 10), ("artists_test.json", 600, 15)):
            loaded = load_artists(shared(f"artists/{name}"))
            assert (len(loaded.tasks), len({prompt.artist for prompt in loaded.tasks})) == (prompts, artists)
            assert loaded.notes == ()
        assert (loaded.tasks[0].place, loaded.tasks[0].template) == ("item 1", "a painting of {}")
        assert loaded.tasks[0].seed == 7488


class TestStyleScores:
    SCORES = StyleScores(
        artists=("Ann", "Ann", "Bo", "Bo"),
        base_clip=(20, 22, 30, 32),
        edited_clip=(19, 21, 30, 31),
        lpips=(0, 0.2, 0, 0),
    )

    def test_rows_average_over_artists(self) -> None:
        rows = self.SCORES.build_rows()
        assert rows["base"]["clip"].mean == pytest.approx(26)
        assert rows["base"]["clip"].ci95 == pytest.approx(12.706 * 5, rel=1e-4)  # Ann 21, Bo 31: s = √50, n = 2
        assert rows["edited"]["clip"].mean == pytest.approx(25.25)
        assert rows["edited"]["clip_change"].mean == pytest.approx(-0.75 / 26)
        assert rows["edited"]["lpips"].mean == pytest.approx(0.05)

    def test_without_lpips(self) -> None:
        assert "lpips" not in StyleScores(("Ann",), (20.0,), (20.0,)).build_rows()["edited"]

    def test_clip_change_needs_a_base_score(self) -> None:
        """A score of 0 has no relative change."""
        assert list(StyleScores(("Ann",), (0.0,), (20.0,)).build_rows()["edited"]) == ["clip"]


def color_distance(ones: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
    return torch.tensor(
        [float(abs(numpy.asarray(a).mean() - numpy.asarray(b).mean())) for a, b in zip(ones, others, strict=True)]
    )


class TestMeasureStyles:
    PROMPTS = tuple(StylePrompt(f"item {n}", f"artist {n // 4}", "art of {}", 100 + n) for n in range(36))
    SAMPLING = Sampling(num_inference_steps=2, guidance_scale=2.0)

    def test_both_models_use_the_same_seeds(self, pipeline: EditablePipeline, folder: Path, clip: Clip) -> None:
        edited = load_pipeline(folder)
        with torch.no_grad():
            edited.encoder.model.get_parameter("final_layer_norm.weight").mul_(-1)
        scores = measure_styles(pipeline, edited, self.PROMPTS, clip, sampling=self.SAMPLING, distance=color_distance)
        texts, seeds = [each.prompt for each in self.PROMPTS], [each.seed for each in self.PROMPTS]
        before, after = (
            draw_pictures(p, texts, seeds=seeds, num_inference_steps=2, guidance_scale=2.0) for p in (pipeline, edited)
        )
        assert scores.base_clip == pytest.approx(clip.score(before, texts).tolist(), abs=1e-3)
        assert scores.edited_clip == pytest.approx(clip.score(after, texts).tolist(), abs=1e-3)
        assert scores.lpips == pytest.approx(color_distance(before, after).tolist())
        assert max(scores.lpips) > 0 and min(scores.base_clip) > 0 and scores.base_clip != scores.edited_clip

    def test_model_has_no_distance_to_itself(self, pipeline: EditablePipeline, clip: Clip) -> None:
        scores = measure_styles(
            pipeline, pipeline, self.PROMPTS[:3], clip, sampling=self.SAMPLING, distance=color_distance
        )
        assert scores.lpips == (0.0, 0.0, 0.0)
        assert scores.base_clip == scores.edited_clip
