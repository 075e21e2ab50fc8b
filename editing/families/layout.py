"""Describe a pipeline's folder: family, text encoders, digests of its files. Free of torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.files import File

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
UNET_INDEX = "diffusion_pytorch_model.safetensors.index.json"
"""Index of a U-Net whose weights are in several files."""
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The tokenizer of each text encoder."""
SECOND_MOMENTS = "second_moments.safetensors"
"""A file of second moments beside `model_index.json`, if the pipeline has one."""
_REQUIRED = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")
_REQUIRED_BY_SDXL = ("text_encoder_2", "tokenizer_2")
_EDITED_LAYERS = {("sdxl", "text_encoder"): 3, ("sdxl", "text_encoder_2"): 5}
_SERVED_SUFFIXES = {".json", ".txt", ".safetensors", ".model"}
_VARIANTS = (".fp16.", ".bf16.", ".non_ema.", ".onnx")  # the same weights again
_PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"}


@dataclass(frozen=True)
class EncoderDescription:
    name: str
    layers: int
    width: int
    mlp_width: int


@dataclass(frozen=True)
class PipelineDescription:
    family: str
    """`sd1`, `sd2` or `sdxl`, found by structure."""
    encoders: tuple[EncoderDescription, ...]
    files: tuple[File, ...]
    """model_index.json and the components' JSON, text and safetensors files, sorted by path."""
    digest: str
    """sha256 of the sorted lines "sha256  path": equal digests mean equal pipelines."""


def describe_pipeline(folder: Path) -> PipelineDescription:
    """Describe a diffusers pipeline from its files alone.

    Raises `UnsupportedPipeline` if the folder is no pipeline or of an unknown family, and `UnsafePipeline` if a
    component that editing needs has its weights only as pickles.
    """
    folder = Path(folder)
    components, encoders = _read_components(folder)
    paths = [folder / "model_index.json"]
    for name in components:
        paths += [path for path in (folder / name).rglob("*") if path.suffix in _SERVED_SUFFIXES and path.is_file()]
    files = tuple(sorted((File.read(path, folder=folder) for path in paths), key=lambda file: file.path))
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in files)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return PipelineDescription(family=detect_family(folder), encoders=encoders, files=files, digest=digest)


def select_files(names: Sequence[str]) -> list[str]:
    """Select from a repository's files a pipeline's configurations and safetensors, each weight once.

    Raises `UnsafePipeline` if it has weights as pickles and none as safetensors.
    """
    paths = [PurePosixPath(name) for name in names]
    chosen = [
        path
        for path in paths
        if len(path.parts) <= 2
        and path.suffix in _SERVED_SUFFIXES
        and not any(variant in path.name for variant in _VARIANTS)
        and not (path.suffix == ".safetensors" and len(path.parts) == 1 and path.name != SECOND_MOMENTS)
    ]
    weights = any(path.suffix == ".safetensors" for path in chosen)
    if not weights and any(path.suffix in _PICKLES for path in paths):
        raise UnsafePipeline(
            "the repository has its weights only as pickles, which can run code when opened: ask for a revision with "
            "safetensors, or convert them with save_pretrained(..., safe_serialization=True)",
            pointer="/source",
        )
    return sorted(str(path) for path in chosen)


def detect_family(folder: Path) -> str:
    """Return `sd1`, `sd2` or `sdxl`. Same errors as `describe_pipeline`, but no weights are read."""
    _, encoders = _read_components(folder)
    name = read_json(folder / "model_index.json").get("_class_name")
    if name == "StableDiffusionXLPipeline":
        return "sdxl"
    if name == "StableDiffusionPipeline":
        activation = read_json(folder / "text_encoder" / "config.json").get("hidden_act")
        # SD 2.x uses OpenCLIP's text encoder, SD 1.x OpenAI's.
        return "sd2" if encoders[0].width == 1024 or activation == "gelu" else "sd1"
    raise UnsupportedPipeline(f"a {name} cannot be edited: only StableDiffusionPipeline and StableDiffusionXLPipeline")


def choose_default_layers(family: str, encoder: str, *, last: int) -> tuple[int, ...]:
    """Return the layers edited by default, up to `last`, the layer that the values are optimized for.

    As published: 8 to 10 and 26 to 30 of SDXL's two encoders, and every layer up to `last` of any other encoder.
    """
    count = _EDITED_LAYERS.get((family, encoder), last + 1)
    return tuple(range(max(0, last + 1 - count), last + 1))


def find_weights(folder: Path, component: str) -> Path:
    """Return the component's safetensors file, or the index of a sharded U-Net. Never a pickle."""
    path = folder / component / WEIGHTS[component]
    if component == "unet" and (index := path.with_name(UNET_INDEX)).is_file():
        return index
    if path.is_file():
        return path
    if any(other.suffix in _PICKLES for other in (folder / component).glob("*")):
        raise UnsafePipeline(
            f"{component}/ has its weights only as pickles, which can run code when opened: convert them to "
            f"{path.name} with save_pretrained(..., safe_serialization=True)"
        )
    raise UnsupportedPipeline(f"{component}/ has no {path.name}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `UnsupportedPipeline`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnsupportedPipeline(f"{path.parent.name}/ has no readable {path.name}") from error
    except ValueError as error:
        raise UnsupportedPipeline(f"{path.name} is no JSON file") from error
    if not isinstance(content, dict):
        raise UnsupportedPipeline(f"{path.name} is no JSON object")
    return content


def _read_components(folder: Path) -> tuple[list[str], tuple[EncoderDescription, ...]]:
    index = read_json(folder / "model_index.json")
    components = [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]]
    two_encoders = index.get("_class_name") == "StableDiffusionXLPipeline"
    for name in _REQUIRED + (_REQUIRED_BY_SDXL if two_encoders else ()):
        if name not in components or not (folder / name).is_dir():
            raise UnsupportedPipeline(f"the pipeline has no {name}/")
    for name in set(components) & set(WEIGHTS):
        find_weights(folder, name)
    encoders = (_describe_encoder(folder, name) for name in ("text_encoder", "text_encoder_2") if name in components)
    return components, tuple(encoders)


def _describe_encoder(folder: Path, name: str) -> EncoderDescription:
    config = read_json(folder / name / "config.json")
    try:
        return EncoderDescription(
            name=name,
            layers=int(config["num_hidden_layers"]),
            width=int(config["hidden_size"]),
            mlp_width=int(config["intermediate_size"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedPipeline(f"{name}/config.json does not describe a CLIP text encoder") from error
