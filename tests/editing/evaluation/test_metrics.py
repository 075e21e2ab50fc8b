"""Metrics against values that were worked out by hand, and against the CLIP model's own words."""

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from editing.errors import MetricUnavailable
from editing.evaluation.metrics import (
    Clip,
    FeatureMoments,
    NetworkDistance,
    compute_frechet_distance,
    load_inception,
    load_lpips,
)
from editing.prompts import PromptTokenizer

RED, BLUE = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))


def moments(mean: list[float], covariance: list[list[float]]) -> FeatureMoments:
    return FeatureMoments(torch.tensor(mean).double(), torch.tensor(covariance).double())


class TestClip:
    def cosines(self, folder: Path, pictures: list[Image.Image], texts: list[str]) -> Tensor:
        """(pictures, texts) by the model's own forward, from pixels normalized by hand."""
        model = CLIPModel.from_pretrained(folder).eval()
        tokenizer = PromptTokenizer.from_folder(folder)
        ids = torch.tensor([tokenizer.pad(tokenizer.encode(text).ids) for text in texts])
        values = torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures])) / 255
        pixels = (values - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
        with torch.no_grad():
            told = model(input_ids=ids, pixel_values=pixels.permute(0, 3, 1, 2).float())
        return told.image_embeds @ told.text_embeds.T  # both of unit length

    def test_score_is_100_times_the_cosine(self, clip: Clip, clip_folder: Path, pictures: list[Image.Image]) -> None:
        texts = [f"picture number {number}" for number in range(len(pictures))]  # more than a batch
        expected = self.cosines(clip_folder, pictures, texts).diagonal()
        assert (expected < 0).any() and (expected > 0).any()
        torch.testing.assert_close(clip.score(pictures, texts), 100 * expected.clamp(min=0), rtol=1e-4, atol=1e-4)

    def test_nearer_text_is_preferred(self, clip: Clip, clip_folder: Path, pictures: list[Image.Image]) -> None:
        nearness = self.cosines(clip_folder, pictures, ["a cat", "the sea"])
        cats, seas = ["a cat"] * len(pictures), ["the sea"] * len(pictures)
        expected = nearness[:, 0] > nearness[:, 1]
        assert expected.any()
        assert clip.prefers(pictures, cats, seas).tolist() == expected.tolist()
        assert clip.prefers(pictures, seas, cats).tolist() == (~expected).tolist()
        assert not clip.prefers(pictures, cats, cats).any()

    def test_pictures_of_any_size_and_mode(self, clip: Clip) -> None:
        wide = Image.new("RGBA", (48, 16), (255, 0, 0, 255))
        found = clip.embed_pictures([RED, wide])
        torch.testing.assert_close(found[0], found[1])  # cropped to its middle
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))

    def test_long_text_is_truncated(self, clip: Clip) -> None:
        torch.testing.assert_close(*clip.embed_texts(["ab" * 40, "ab" * 50]))

    def test_folder_without_a_model_is_refused(self, clip_folder: Path, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(MetricUnavailable, match=r"nowhere/ has no CLIP model"):
            Clip.from_folder(tmp_path / "nowhere")
        with pytest.raises(MetricUnavailable, match="of type 'clip_text_model', not 'clip'"):
            Clip.from_folder(folder / "text_encoder")

    def test_pickles_are_not_opened(self, clip_folder: Path, tmp_path: Path) -> None:
        for file in clip_folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(MetricUnavailable, match="safetensors"):
            Clip.from_folder(tmp_path)


class TestFrechetDistance:
    @pytest.mark.parametrize(
        ("ones", "others", "expected"),
        [
            (moments([0.0], [[1.0]]), moments([3.0], [[4.0]]), 9 + (2 - 1) ** 2),
            (
                moments([1.0, 2.0], [[1.0, 0.0], [0.0, 9.0]]),
                moments([1.0, 0.0], [[4.0, 0.0], [0.0, 1.0]]),
                4 + 1 + 4,
            ),
            # tr (C1 C2)^½ = √(tr M + 2 √det M) with M = C1 C2 = [[2, 4], [1, 8]]: √(10 + 2 √12)
            (
                moments([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]]),
                moments([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]]),
                4 + 5 - 2 * (10 + 2 * 12**0.5) ** 0.5,
            ),
            # singular: one dimension has no spread on either side
            (
                moments([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]]),
                moments([0.0, 2.0], [[9.0, 0.0], [0.0, 0.0]]),
                4 + 4,
            ),
        ],
        ids=["one dimension", "diagonal", "do not commute", "singular"],
    )
    def test_distance_of_gaussians(self, ones: FeatureMoments, others: FeatureMoments, expected: float) -> None:
        assert compute_frechet_distance(ones, others) == pytest.approx(expected, rel=1e-9)
        assert compute_frechet_distance(others, ones) == pytest.approx(expected, rel=1e-9)

    def test_moments_of_features(self) -> None:
        found = FeatureMoments.from_features(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 3.0]]))
        assert found.mean.tolist() == [2.0, 1.0]
        assert found.covariance.tolist() == [[4.0, 3.0], [3.0, 3.0]]
        assert found.mean.dtype == torch.float64

    def test_distance_of_few_pictures_to_themselves_is_zero(self) -> None:
        features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        assert compute_frechet_distance(*[FeatureMoments.from_features(features)] * 2) == pytest.approx(0, abs=1e-6)

    def test_distance_of_pictures(self) -> None:
        """Features are the mean colors: red's and blue's moments by hand."""

        def extract(pictures: list[Image.Image]) -> Tensor:
            return torch.tensor([numpy.asarray(picture).mean((0, 1)).tolist() for picture in pictures])

        dark = Image.new("RGB", (16, 16), (253, 0, 0))
        reds = FeatureMoments.from_batches([extract([RED]), extract([dark])])
        blues = FeatureMoments.from_features(extract([BLUE, BLUE]))
        assert compute_frechet_distance(reds, blues) == pytest.approx(
            254**2 + 255**2 + 2
        )  # shift, and red's variance of 2

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_pictures_are_refused(self, count: int) -> None:
        with pytest.raises(MetricUnavailable, match="FID needs two pictures or more"):
            FeatureMoments.from_batches([torch.zeros(1, 3)] * count)


class _MeanDifference(torch.nn.Module):
    """Shaped as LPIPS's network: (n, 3, h, w) twice to (n, 1, 1, 1)."""

    def forward(self, ones: Tensor, others: Tensor) -> Tensor:
        return (ones - others).abs().mean((1, 2, 3), keepdim=True)


class TestNetworkDistance:
    def test_pixels_are_between_minus_one_and_one(self) -> None:
        distance = NetworkDistance(_MeanDifference())
        white, black = Image.new("RGB", (16, 16), "white"), Image.new("L", (16, 16), 0)
        assert distance([white, RED, black], [black, BLUE, black]).tolist() == pytest.approx([2.0, 2 * 2 / 3, 0.0])

    def test_channels_come_first(self) -> None:
        class Green(torch.nn.Module):
            def forward(self, ones: Tensor, others: Tensor) -> Tensor:
                return ones[:, 1].amax((1, 2)) + 0 * others.sum((1, 2, 3))

        green = Image.new("RGB", (8, 4), (0, 255, 0))
        assert NetworkDistance(Green())([green, RED.resize((8, 4))], [green, green]).tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("package", "open_metric"), [("cleanfid", load_inception), ("lpips", load_lpips)], ids=["fid", "lpips"]
)
def test_missing_extra_is_named(package: str, open_metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [package, f"{package}.features", f"{package}.resize"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(MetricUnavailable, match=r"pip install 'emender-service\[evaluation\]'"):
        open_metric()
