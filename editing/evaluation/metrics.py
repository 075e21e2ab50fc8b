"""What pictures are measured by: CLIP's scores and preferences, FID, LPIPS.

CLIP needs nothing but `transformers` and a folder with a model. FID and LPIPS are formulas over what a network makes
of pictures: the formulas are here and take any such network. The usual ones, Inception by `clean-fid` and AlexNet by
`lpips`, come with the extra `evaluation`, which brings torchvision, and both fetch weights from the internet at their
first use: they are imported only where they are asked for. The tests know the formulas on other networks. The adapters
were held against the code of lpips 0.1.4 and clean-fid 0.1.35 with random weights; with the published weights, which
need torchvision and the internet, neither has been run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel

from editing.errors import MetricUnavailable, UnsupportedPipeline
from editing.families.layout import read_json
from editing.prompts import PromptTokenizer

_BATCH = 32


class Clip:
    """A CLIP model that says how near pictures are to texts. Texts are cut to its length, as CLIP cuts them."""

    def __init__(self, model: CLIPModel, tokenizer: PromptTokenizer, processor: CLIPImageProcessorPil) -> None:
        self._model, self._tokenizer, self._processor = model.requires_grad_(False).eval(), tokenizer, processor
        self._embed_text = lru_cache(maxsize=65536)(self._read_text)

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> "Clip":
        """From a folder such as a download of openai/clip-vit-large-patch14: config.json, model.safetensors, the
        tokenizer's files and preprocessor_config.json, all side by side. Nothing is fetched and no pickle is opened.

        Raises `MetricUnavailable` where the folder has no such model.
        """
        folder = Path(folder)
        try:
            kind = read_json(folder / "config.json").get("model_type")
            if kind != "clip":
                raise MetricUnavailable(f"{folder.name}/ holds a model of type {kind!r}, not 'clip'")
            tokenizer = PromptTokenizer.from_folder(folder)
            options = {"local_files_only": True}
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, **options).to(device)
            return cls(model, tokenizer, CLIPImageProcessorPil.from_pretrained(folder, **options))
        except (UnsupportedPipeline, OSError) as error:
            raise MetricUnavailable(f"{folder.name}/ holds no CLIP model that can be read: {error}") from error

    @property
    def scale(self) -> float:
        """What a cosine is multiplied by before a softmax over texts."""
        return float(self._model.logit_scale.exp())

    def score(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """The CLIP score of each picture with its own text, (n,) in 0..100: 100 · max(cos, 0) (Hessel et al., 2021,
        in the scale that papers report; theirs is 2.5 · max(cos, 0))."""
        return 100 * self._nearness(pictures, texts).clamp(min=0)

    def prefers(self, pictures: Sequence[Image.Image], texts: Sequence[str], others: Sequence[str]) -> Tensor:
        """Whether each picture is nearer to its text than to the other, (n,) of bool."""
        pictured = self.embed_pictures(pictures)
        nearer, farther = (_rowwise(pictured, self.embed_texts(side)) for side in (texts, others))
        return nearer > farther

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d) in float32."""
        parts = []
        for start in range(0, len(pictures), _BATCH):
            batch = [picture.convert("RGB") for picture in pictures[start : start + _BATCH]]
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]  # (b, 3, h, w)
            parts.append(_projected(self._model.get_image_features(pixels.to(self._model.device, self._model.dtype))))
        return functional.normalize(torch.cat(parts).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d) in float32. A text is read once, however often it is asked for."""
        return torch.stack([self._embed_text(text) for text in texts])

    def _nearness(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """The cosine of each picture and its text, (n,)."""
        return _rowwise(self.embed_pictures(pictures), self.embed_texts(texts))

    @torch.no_grad()
    def _read_text(self, text: str) -> Tensor:
        ids = self._tokenizer.pad(self._tokenizer.encode(text).ids)
        said = _projected(self._model.get_text_features(torch.tensor([ids], device=self._model.device)))
        return functional.normalize(said[0].float(), dim=-1)


def _rowwise(ones: Tensor, others: Tensor) -> Tensor:
    return (ones * others).sum(-1)


def _projected(features: object) -> Tensor:
    """transformers 5 wraps the projected embedding in an output, older ones give it as it is."""
    return features if isinstance(features, Tensor) else features.pooler_output  # type: ignore[attr-defined]


class FeatureExtractor(Protocol):
    """A network that turns pictures into features (n, d)."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor: ...


@dataclass(frozen=True)
class FeatureMoments:
    """Mean (d,) and unbiased covariance (d, d) of pictures' features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "FeatureMoments":
        """Of features (n, d). Raises `MetricUnavailable` for fewer than two."""
        if len(features) < 2:
            raise MetricUnavailable(f"{len(features)} picture(s) have no covariance: FID needs two or more")
        features = features.double()
        return cls(features.mean(0), torch.atleast_2d(torch.cov(features.T)))

    @classmethod
    def of_batches(cls, batches: Iterable[Tensor]) -> "FeatureMoments":
        """Of features that come in parts, each (·, d)."""
        parts = [features.float().cpu() for features in batches]
        return cls.of(torch.cat(parts) if parts else torch.empty(0, 1))


def frechet_distance(ones: FeatureMoments, others: FeatureMoments) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½), the FID of two sets of Inception features (Heusel et al., 2017).

    The trace of the root is the sum of the roots of the eigenvalues of C₁^½ C₂ C₁^½, which is symmetric: that stays
    real where covariances are singular, as those of fewer pictures than features are. In float64, as their roots lose
    half of the digits.
    """
    shift = (ones.mean - others.mean).square().sum()
    values, vectors = torch.linalg.eigh(ones.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ others.covariance @ root)
    spread = ones.covariance.trace() + others.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float(shift + spread.clamp(min=0))


def inception_features(*, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The features of FID by `clean-fid` (Parmar, Zhang and Zhu, 2022): its resizing and its Inception, 2048 wide.

    Raises `MetricUnavailable` where the extra is not installed. `clean-fid` fetches the weights, a TorchScript file, at
    the first use and keeps them in the system's temporary folder.
    """
    try:
        from cleanfid.features import build_feature_extractor
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise _needs_extra("FID by clean-fid", error) from error
    resize = build_resizer("clean")
    network = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)

    @torch.no_grad()
    def extract(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = numpy.stack([resize(numpy.asarray(picture.convert("RGB"))) for picture in pictures])
        return network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))  # of (n, 3, 299, 299) in 0..255

    return extract


class PictureDistance(Protocol):
    """How different two pictures look: for n pairs, (n,)."""

    def __call__(self, ones: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor: ...


class NetworkDistance:
    """A `PictureDistance` by a network such as LPIPS's, which compares two batches (n, 3, h, w) of pixels in -1..1."""

    def __init__(self, network: torch.nn.Module, *, device: str | torch.device = "cpu") -> None:
        self._network, self._device = network.requires_grad_(False).eval().to(device), device

    @torch.no_grad()
    def __call__(self, ones: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        return self._network(self._pixels(ones), self._pixels(others)).flatten().float().cpu()

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        stacked = numpy.stack([numpy.asarray(picture.convert("RGB")) for picture in pictures])  # (n, h, w, 3)
        return torch.from_numpy(stacked).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1


def lpips_distance(network: str = "alex", *, device: str | torch.device = "cpu") -> PictureDistance:
    """LPIPS (Zhang et al., 2018) by the package `lpips`, version 0.1 of its weights; `network` is alex, vgg or squeeze.

    Raises `MetricUnavailable` where the extra is not installed. torchvision fetches the network's weights at the first
    use; those of LPIPS itself come with the package.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise _needs_extra("LPIPS", error) from error
    return NetworkDistance(LPIPS(net=network, verbose=False), device=device)


def _needs_extra(metric: str, error: ImportError) -> MetricUnavailable:
    return MetricUnavailable(f"{metric} needs the extra: pip install 'emender-service[evaluation]' ({error})")
