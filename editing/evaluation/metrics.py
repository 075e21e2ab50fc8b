"""Metrics of pictures: CLIP scores and preferences, FID, LPIPS.

CLIP needs `transformers` and a folder with a model. FID and LPIPS are formulas over a network's output: the formulas
are here and take any such network. The usual networks, Inception of `clean-fid` and AlexNet of `lpips`, come with the
extra `evaluation`, which installs torchvision. Both download weights at their first use, so they are imported only when
they are needed. The tests check the formulas with other networks. The adapters were compared with the code of lpips
0.1.4 and clean-fid 0.1.35 with random weights; with the published weights neither has been run.
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
    """A CLIP model that compares pictures with texts. Texts are truncated to its length, as CLIP truncates them."""

    def __init__(self, model: CLIPModel, tokenizer: PromptTokenizer, processor: CLIPImageProcessorPil) -> None:
        self._model, self._tokenizer, self._processor = model.requires_grad_(False).eval(), tokenizer, processor
        self._embed_text = lru_cache(maxsize=65536)(self._embed_text_uncached)

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> "Clip":
        """Load a folder such as a download of openai/clip-vit-large-patch14.

        It needs config.json, model.safetensors, the tokenizer's files and preprocessor_config.json. Nothing is
        downloaded and no pickle is opened. Raises `MetricUnavailable` if the folder has no such model.
        """
        folder = Path(folder)
        try:
            kind = read_json(folder / "config.json").get("model_type")
            if kind != "clip":
                raise MetricUnavailable(f"{folder.name}/ has a model of type {kind!r}, not 'clip'")
            tokenizer = PromptTokenizer.from_folder(folder)
            options = {"local_files_only": True}
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, **options).to(device)
            return cls(model, tokenizer, CLIPImageProcessorPil.from_pretrained(folder, **options))
        except (UnsupportedPipeline, OSError) as error:
            raise MetricUnavailable(f"{folder.name}/ has no CLIP model that can be read: {error}") from error

    @property
    def scale(self) -> float:
        """Factor of the cosines before a softmax over texts."""
        return float(self._model.logit_scale.exp())

    def score(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Return the CLIP score of each picture with its own text, (n,) in 0..100.

        It is 100 · max(cos, 0): the score of Hessel et al. (2021), 2.5 · max(cos, 0), in the scale that papers report.
        """
        return 100 * _multiply_rows(self.embed_pictures(pictures), self.embed_texts(texts)).clamp(min=0)

    def prefers(self, pictures: Sequence[Image.Image], texts: Sequence[str], others: Sequence[str]) -> Tensor:
        """Return whether each picture is nearer to its text than to the other, (n,) bool."""
        embedded = self.embed_pictures(pictures)
        own, other = (_multiply_rows(embedded, self.embed_texts(side)) for side in (texts, others))
        return own > other

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (n, d) float32."""
        parts = []
        for start in range(0, len(pictures), _BATCH):
            batch = [picture.convert("RGB") for picture in pictures[start : start + _BATCH]]
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]  # (b, 3, h, w)
            parts.append(
                _unwrap_features(self._model.get_image_features(pixels.to(self._model.device, self._model.dtype)))
            )
        return functional.normalize(torch.cat(parts).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, d) float32. Each text is encoded once."""
        return torch.stack([self._embed_text(text) for text in texts])

    @torch.no_grad()
    def _embed_text_uncached(self, text: str) -> Tensor:
        ids = self._tokenizer.pad(self._tokenizer.encode(text).ids)
        features = _unwrap_features(self._model.get_text_features(torch.tensor([ids], device=self._model.device)))
        return functional.normalize(features[0].float(), dim=-1)


def _multiply_rows(ones: Tensor, others: Tensor) -> Tensor:
    """Return the inner products of rows (n, d) with rows (n, d), (n,)."""
    return (ones * others).sum(-1)


def _unwrap_features(features: object) -> Tensor:
    """Return the projected embedding. transformers 5 wraps it in an output, older versions do not."""
    return features if isinstance(features, Tensor) else features.pooler_output  # type: ignore[attr-defined]


class FeatureExtractor(Protocol):
    """A network that turns n pictures into features (n, d)."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor: ...


@dataclass(frozen=True)
class FeatureMoments:
    """Mean (d,) and unbiased covariance (d, d) of the features of pictures, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def from_features(cls, features: Tensor) -> "FeatureMoments":
        """Compute the moments of features (n, d). Raises `MetricUnavailable` for fewer than two pictures."""
        if len(features) < 2:
            raise MetricUnavailable(f"FID needs two pictures or more, not {len(features)}")
        features = features.double()
        return cls(features.mean(0), torch.atleast_2d(torch.cov(features.T)))

    @classmethod
    def from_batches(cls, batches: Iterable[Tensor]) -> "FeatureMoments":
        """Compute the moments of batches of features, (·, d) each."""
        parts = [features.float().cpu() for features in batches]
        return cls.from_features(torch.cat(parts) if parts else torch.empty(0, 1))


def compute_frechet_distance(ones: FeatureMoments, others: FeatureMoments) -> float:
    """Compute FID = |μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½) of two sets of features (Heusel et al., 2017).

    The trace of the root is Σ √λ over the eigenvalues of C₁^½ C₂ C₁^½. That matrix is symmetric, so the roots stay real
    if covariances are singular, as they are with fewer pictures than features. In float64: roots lose half the digits.
    """
    shift = (ones.mean - others.mean).square().sum()
    values, vectors = torch.linalg.eigh(ones.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # C₁^½ (d, d)
    product = torch.linalg.eigvalsh(root @ others.covariance @ root)
    spread = ones.covariance.trace() + others.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float(shift + spread.clamp(min=0))


def load_inception(*, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load the features of FID from `clean-fid` (Parmar, Zhang and Zhu, 2022): its resizing and Inception, 2048 wide.

    Raises `MetricUnavailable` if the extra is not installed. `clean-fid` downloads the weights, a TorchScript file, at
    the first use and keeps them in the system's temporary folder.
    """
    try:
        from cleanfid.features import build_feature_extractor
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise _build_missing_extra("FID by clean-fid", error) from error
    resize = build_resizer("clean")
    network = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)

    @torch.no_grad()
    def extract(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = numpy.stack([resize(numpy.asarray(picture.convert("RGB"))) for picture in pictures])
        return network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))  # (n, 3, 299, 299) in 0..255

    return extract


class PictureDistance(Protocol):
    """Measures how different two pictures look: (n,) for n pairs."""

    def __call__(self, ones: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor: ...


class NetworkDistance:
    """A `PictureDistance` of a network such as LPIPS, which compares two batches (n, 3, h, w) of pixels in -1..1."""

    def __init__(self, network: torch.nn.Module, *, device: str | torch.device = "cpu") -> None:
        self._network, self._device = network.requires_grad_(False).eval().to(device), device

    @torch.no_grad()
    def __call__(self, ones: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        return self._network(self._to_pixels(ones), self._to_pixels(others)).flatten().float().cpu()

    def _to_pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        stacked = numpy.stack([numpy.asarray(picture.convert("RGB")) for picture in pictures])  # (n, h, w, 3)
        return torch.from_numpy(stacked).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_lpips(network: str = "alex", *, device: str | torch.device = "cpu") -> PictureDistance:
    """Load LPIPS (Zhang et al., 2018) from the package `lpips`, version 0.1. `network` is alex, vgg or squeeze.

    Raises `MetricUnavailable` if the extra is not installed. torchvision downloads the network's weights at the first
    use; the weights of LPIPS itself come with the package.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise _build_missing_extra("LPIPS", error) from error
    return NetworkDistance(LPIPS(net=network, verbose=False), device=device)


def _build_missing_extra(metric: str, error: ImportError) -> MetricUnavailable:
    return MetricUnavailable(f"{metric} needs the extra: pip install 'emender-service[evaluation]' ({error})")
