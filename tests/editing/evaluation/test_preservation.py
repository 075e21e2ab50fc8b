"""Captions and photographs: what is read, and what both models' rows say."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from editing.errors import CaptionsUnreadable, TaskUnreadable
from editing.evaluation.drawing import Sampling
from editing.evaluation.metrics import Clip, FeatureMoments
from editing.evaluation.preservation import (
    CaptionScores,
    compare_captions,
    load_captions,
    measure_captions,
    open_pictures,
)
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline


class TestLoadCaptions:
    def test_captions_of_a_table(self, tmp_path: Path) -> None:
        (tmp_path / "coco.csv").write_text("id,caption\n1,A cat.\n2,\n3,A dog.\n4,A fish.\n")
        assert load_captions(tmp_path / "coco.csv", limit=2) == ["A cat.", "A dog."]

    def test_file_without_captions_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "coco.txt").write_text("\n\n")
        with pytest.raises(TaskUnreadable, match=r"coco.txt: has no captions"):
            load_captions(tmp_path / "coco.txt")

    def test_missing_column_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "coco.csv").write_text("id,title\n1,A cat.\n")
        with pytest.raises(CaptionsUnreadable, match=r"coco.csv, line 1: there is no column 'caption'"):
            load_captions(tmp_path / "coco.csv")


class TestOpenPictures:
    def test_pictures_come_in_batches_by_name(self, tmp_path: Path) -> None:
        for number in range(34):
            Image.new("L", (4, 4), number).save(tmp_path / f"{number:02}.{'png' if number % 2 else 'PNG'}")
        (tmp_path / "notes.txt").write_text("no picture")
        batches = list(open_pictures(tmp_path))
        assert list(map(len, batches)) == [32, 2]
        assert [picture.getpixel((0, 0)) for batch in batches for picture in batch] == [(n, n, n) for n in range(34)]

    def test_folder_without_pictures_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TaskUnreadable, match="has no pictures"):
            next(open_pictures(tmp_path))
        (tmp_path / "broken.png").write_bytes(b"\x89PNG")
        with pytest.raises(TaskUnreadable, match=r"broken.png: the content of the file is not a PNG, JPEG or WebP"):
            next(open_pictures(tmp_path))


def colours(pictures: Sequence[Image.Image]) -> Tensor:
    return torch.tensor(numpy.array([numpy.asarray(picture).mean((0, 1)) for picture in pictures]))


class TestMeasureCaptions:
    CAPTIONS = tuple(f"a cat on {number} boats" for number in range(34))

    def test_each_caption_has_its_own_seed(self, pipeline: EditablePipeline, clip: Clip) -> None:
        sampling = Sampling(num_inference_steps=2, guidance_scale=2.0)
        found = measure_captions(pipeline, self.CAPTIONS, clip, seed=5, sampling=sampling, extract=colours)
        pictures = draw_pictures(pipeline, self.CAPTIONS, seeds=range(5, 39), num_inference_steps=2, guidance_scale=2.0)
        assert found.clip == pytest.approx(clip.score(pictures, self.CAPTIONS).tolist(), abs=1e-3)
        assert min(found.clip) > 0
        expected = colours(pictures).numpy()
        assert found.features is not None
        assert found.features.mean.numpy() == pytest.approx(expected.mean(0))
        assert found.features.covariance.numpy() == pytest.approx(numpy.cov(expected, rowvar=False), rel=1e-4)
        assert measure_captions(pipeline, self.CAPTIONS[:1], clip, sampling=sampling).features is None


class TestCompare:
    def scores(self, clip: tuple[float, ...], level: float) -> CaptionScores:
        return CaptionScores(
            clip, FeatureMoments.from_features(torch.tensor([[level - 1.0], [level + 1.0]]))
        )  # variance 2

    def test_rows_have_clip_and_fid(self) -> None:
        base, edited = self.scores((20, 30), 0.0), self.scores((20, 28), 3.0)
        photographs = FeatureMoments.from_features(
            torch.tensor([[0.0], [4.0]])
        )  # mean 2, variance 8: roots √2 and 2 √2
        rows = compare_captions(base, edited, photographs=photographs)
        assert {name: figure.mean for name, figure in rows["base"].items()} == pytest.approx(
            {"clip": 25, "fid": 2**2 + 2}
        )
        assert {name: figure.mean for name, figure in rows["edited"].items()} == pytest.approx(
            {"clip": 24, "fid_base": 9, "fid": 1 + 2}
        )
        assert rows["base"]["clip"].ci95 == pytest.approx(12.706 * 5, rel=1e-4)

    def test_without_photographs_or_features(self) -> None:
        base, edited = self.scores((20, 30), 0.0), self.scores((20, 28), 3.0)
        assert list(compare_captions(base, edited)["edited"]) == ["clip", "fid_base"]
        assert list(compare_captions(CaptionScores((20.0, 30.0)), CaptionScores((20.0, 30.0)))["edited"]) == ["clip"]
