"""A benchmark: a model, a classifier and tasks; and how to open one, also in another process."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from editing.edits import StageOneSettings
from editing.errors import EditingError, TaskUnreadable, UnsupportedPipeline
from editing.evaluation.classifiers import Classifier, HuggingFaceClassifier
from editing.evaluation.iceb import Suite
from editing.evaluation.iceb_files import IcebFiles
from editing.families.registry import FAMILIES
from editing.pipelines import EditablePipeline, load_pipeline
from editing.second_moments.moments import SecondMoments

GROUP = "emender.benchmarks"
"""Entry points by which a package adds a benchmark: a function of the keyword `device` that returns one."""

SECOND_MOMENTS = "second_moments.safetensors"
_PIPELINE_FILES = [
    "model_index.json", "*/*.json", "*/*.txt", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors",
    SECOND_MOMENTS,
]  # fmt: skip
_UNUSED_COMPONENTS = ["safety_checker/*", "feature_extractor/*"]


@dataclass
class Benchmark:
    name: str
    pipeline: EditablePipeline
    classifier: Classifier
    second_moments: SecondMoments
    """Of all text encoders of the pipeline."""
    suite: Suite
    num_inference_steps: int
    guidance_scale: float
    known: tuple[str, ...] = ()
    """Names that the model knows, for methods that preserve them."""

    @cached_property
    def digests(self) -> dict[str, str]:
        """The sha256 of what results depend on: weights of the model and the classifier, and the statistics."""
        generator = self.pipeline.generator
        model = (generator.network, generator.autoencoder.model, *(encoder.model for encoder in self.pipeline.encoders))
        classifier = getattr(self.classifier, "model", self.classifier)
        return {
            "model": _hash_tensors(tensor for module in model for tensor in module.state_dict().values()),
            "classifier": _hash_tensors(classifier.state_dict().values()) if isinstance(classifier, nn.Module) else "",
            "second_moments": self.second_moments.digest,
        }


@dataclass(frozen=True)
class BenchmarkSource:
    """Where a benchmark comes from. It can be sent to another process, which opens its own."""

    model: str
    """An installed benchmark's name, a pipeline's folder, or its id on the Hugging Face Hub."""
    classifier: str | None = None
    """A folder or an id on the Hub; not for an installed benchmark."""
    data: Path | None = None
    """The folder of ICEB's files; not for an installed benchmark."""
    second_moments: Path | None = None
    """Their file. Default: in the pipeline's folder."""
    device: str = "cpu"
    num_inference_steps: int | None = None
    """Default: the installed benchmark's own, else 20."""

    @property
    def is_installed(self) -> bool:
        return self.model in list_benchmarks()

    def open(self) -> Benchmark:
        """Open the benchmark. Raises `EditingError` if a part cannot be found or read."""
        installed = {point.name: point for point in entry_points(group=GROUP)}
        if self.model in installed:
            benchmark: Benchmark = installed[self.model].load()(device=self.device)
            if self.num_inference_steps is not None:
                benchmark.num_inference_steps = self.num_inference_steps
            return benchmark
        if self.classifier is None or self.data is None:
            raise TaskUnreadable(
                f"{self.model!r} is no installed benchmark ({', '.join(sorted(installed)) or 'there are none'}): "
                "for another model, give a classifier and the folder of ICEB's files"
            )
        num_inference_steps = 20 if self.num_inference_steps is None else self.num_inference_steps
        files = IcebFiles(self.data, StageOneSettings(num_inference_steps=num_inference_steps))
        classifier = HuggingFaceClassifier.load(self.classifier, names=files.names, device=self.device)
        folder = _find_pipeline(self.model)
        pipeline = load_pipeline(folder, device=self.device, dtype=_choose_dtype(self.device))
        return Benchmark(
            name="iceb",
            pipeline=pipeline,
            classifier=classifier,
            second_moments=_load_moments(self.second_moments or folder / SECOND_MOMENTS),
            suite=files,
            num_inference_steps=num_inference_steps,
            guidance_scale=FAMILIES[pipeline.family].guidance_scale,
            known=tuple(files.names),
        )


def list_benchmarks() -> tuple[str, ...]:
    """Return the names of the installed benchmarks."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def _find_pipeline(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, allow_patterns=_PIPELINE_FILES, ignore_patterns=_UNUSED_COMPONENTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedPipeline(f"{model} is no folder, and the Hub does not have it: {error}") from error


def _load_moments(path: Path) -> SecondMoments:
    if not path.is_file():
        raise EditingError(
            f"there is no {path}: estimate the second moments of the model's keys with "
            "`editing.estimate_second_moments` from some ten thousand captions, and save them there"
        )
    return SecondMoments.load(path)


def _choose_dtype(device: str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def _hash_tensors(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
