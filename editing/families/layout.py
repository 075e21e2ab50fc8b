"""Describe a pipeline's folder: family, text encoders, digests of its files. Free of torch."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.families.family import EncoderSpec, Tap
from editing.families.registry import FAMILIES, find_family
from editing.families.sd import SD1, SD2
from editing.files import File
from editing.prompts import load_tokenizers

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
"""The tokenizer of each text encoder."""
WEIGHTS = {
    **dict.fromkeys((*TOKENIZERS, "safety_checker", "image_encoder"), "model.safetensors"),
    **dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model.safetensors"),
}
"""The file of a component's weights. Those in several files have an index. Files of a variant have its name, too."""
VARIANTS = (None, "fp16", "bf16")
"""The variants of weights, the preferred one first."""
CODE_SETTINGS = (
    "_attn_implementation",
    "attn_implementation",
    "auto_map",
    "quantization_config",
    "transformers_weights",
)
"""Settings of a configuration that choose code or files of weights. Loading ignores them."""
SECOND_MOMENTS = "second_moments.safetensors"
"""A file of second moments beside `model_index.json`, if the pipeline has one."""
_SERVED_SUFFIXES = {".json", ".txt", ".jinja", ".safetensors", ".model"}
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema|onnx)[.-]")
_KINDS = {"clip": "CLIP", "t5": "T5", "decoder": "decoder-only"}
_MODEL_TYPES: dict[str, frozenset[str]] = {
    "clip": frozenset(),  # old configurations do not name it
    "t5": frozenset({"t5", "umt5"}),
    "decoder": frozenset(
        {"gemma2", "llama", "mistral", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text", "smollm3"}
    ),
}
_SIZES = {
    "clip": ("num_hidden_layers", "hidden_size", "intermediate_size"),
    "t5": ("num_layers", "d_model", "d_ff"),
    "decoder": ("num_hidden_layers", "hidden_size", "intermediate_size"),
}
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
    """Its name in `editing.families.registry`."""
    encoders: tuple[EncoderDescription, ...]
    files: tuple[File, ...]
    """model_index.json and the components' JSON, text and safetensors files, sorted by path."""
    digest: str
    """sha256 of the sorted lines "sha256  path": equal digests mean equal pipelines."""


def describe_pipeline(folder: Path) -> PipelineDescription:
    """Describe a diffusers pipeline from its files alone.

    Raises `UnsupportedPipeline` if the folder is no pipeline, or its family, a text encoder or a tokenizer is unknown.
    Raises `UnsafePipeline` if a component that editing needs has its weights only as pickles.
    """
    folder = Path(folder)
    components, encoders = _read_components(folder)
    family = detect_family(folder)
    for tokenizer in load_tokenizers(folder, FAMILIES[family]):
        tokenizer.encode("a photo")
    paths = [folder / "model_index.json"]
    for name in components:
        paths += [path for path in (folder / name).rglob("*") if path.suffix in _SERVED_SUFFIXES and path.is_file()]
    files = tuple(sorted((File.read(path, folder=folder) for path in paths), key=lambda file: file.path))
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in files)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return PipelineDescription(family=family, encoders=encoders, files=files, digest=digest)


def select_files(names: Sequence[str]) -> list[str]:
    """Select from a repository's files a pipeline's configurations and safetensors, each weight once.

    A variant of the weights is selected for a component that has no others.

    Raises `UnsafePipeline` if it has weights as pickles and none as safetensors.
    """
    paths = [PurePosixPath(name) for name in names]
    chosen = [
        path
        for path in paths
        if len(path.parts) <= 2
        and path.suffix in _SERVED_SUFFIXES
        and not (path.suffix == ".safetensors" and len(path.parts) == 1 and path.name != SECOND_MOMENTS)
    ]
    variants: dict[PurePosixPath, set[str | None]] = {}
    for path in chosen:
        if path.suffix == ".safetensors":
            variants.setdefault(path.parent, set()).add(find_variant(path))
    wanted = {parent: next((v for v in VARIANTS if v in found), None) for parent, found in variants.items()}
    chosen = [path for path in chosen if find_variant(path) in {None, wanted.get(path.parent)}]
    weights = any(path.suffix == ".safetensors" for path in chosen)
    if not weights and any(path.suffix in _PICKLES for path in paths):
        raise UnsafePipeline(
            "the repository has its weights only as pickles, which can run code when opened: ask for a revision with "
            "safetensors, or convert them with save_pretrained(..., safe_serialization=True)",
            pointer="/source",
        )
    return sorted(str(path) for path in chosen)


def detect_family(folder: Path) -> str:
    """Return the name of the pipeline's family. Same errors as `describe_pipeline`, but no weights are read."""
    family = find_family(read_json(folder / "model_index.json").get("_class_name"))
    _, encoders = _read_components(folder)
    if family is SD1:
        activation = read_json(folder / "text_encoder" / "config.json").get("hidden_act")
        # SD 2.x uses OpenCLIP's text encoder, SD 1.x OpenAI's.
        return SD2.name if encoders[0].width == 1024 or activation == "gelu" else SD1.name
    return family.name


def choose_default_layers(family: str, encoder: str, *, last: int) -> tuple[int, ...]:
    """Return the layers edited by default, up to `last`, the layer that the values are optimized for.

    As published: 8 to 10 and 26 to 30 of SDXL's two encoders, and every layer up to `last` of any other CLIP encoder.
    Three layers of T5 and of decoders.
    """
    spec = FAMILIES[family].find_encoder(encoder) if family in FAMILIES else None
    count = last + 1
    if spec is not None:
        count = spec.edited_layers or (last + 1 if spec.kind == "clip" else 3)
    return tuple(range(max(0, last + 1 - count), last + 1))


def find_value_layer(spec: EncoderSpec, *, layers: int) -> int:
    """Return L, the last layer edited by default, of an encoder with this number of layers.

    It is the last but one of CLIP: an edit of the last layer would change its output at the subject's own position
    only. In larger encoders, the names that follow the edit are those of early layers.
    """
    wanted = layers - 2 if spec.kind == "clip" else max(2, layers // 7)
    return min(wanted, find_last_value_layer(spec, layers=layers))


def find_last_value_layer(spec: EncoderSpec, *, layers: int) -> int:
    """Return the last layer that values can be optimized for: the last but one, and none after what is read.

    `layers` is the number of layers that the encoder has.
    """
    return min([layers - 2, *(count_blocks(tap, layers=layers) - 1 for tap in spec.taps)])


def count_blocks(tap: Tap, *, layers: int) -> int:
    """Return the number of blocks that have run at a tap of an encoder with this number of layers."""
    if tap == "final":
        return layers
    return tap if tap >= 0 else layers + 1 + tap


def find_weights(folder: Path, component: str) -> Path:
    """Return the component's safetensors file, or the index of its several files. Never a pickle.

    The files of a variant count if there are no others. Of a file and an index, that which the component's library
    reads is returned. Raises `UnsafePipeline`, and `UnsupportedPipeline` if a file is missing.
    """
    single = WEIGHTS[component]
    for variant in VARIANTS:
        ending = f".{variant}" if variant else ""
        file = folder / component / f"{single.removesuffix('.safetensors')}{ending}.safetensors"
        index = folder / component / f"{single}.index{ending}.json"
        # transformers reads a single file first, diffusers an index.
        for path in (file, index) if single == "model.safetensors" else (index, file):
            if path.is_file():
                for part in list_parts(path):
                    if not part.is_file():
                        raise UnsupportedPipeline(f"{component}/ has no {part.name}, which {path.name} names")
                return path
    if any(other.suffix in _PICKLES for other in (folder / component).glob("*")):
        raise UnsafePipeline(
            f"{component}/ has its weights only as pickles, which can run code when opened: convert them to "
            f"{single} with save_pretrained(..., safe_serialization=True)"
        )
    raise UnsupportedPipeline(f"{component}/ has no {single}")


def find_variant(path: PurePath) -> str | None:
    """Return the variant in the name of a file of weights, or of their index."""
    found = _VARIANT.search(path.name)
    return found and found[1]


def list_parts(weights: Path) -> list[Path]:
    """Return the safetensors files of weights that `find_weights` found, sorted by name."""
    if weights.suffix != ".json":
        return [weights]
    return [weights.parent / part for part in sorted(set(read_index(weights).values()))]


def read_index(index: Path) -> dict[str, str]:
    """Return the file of each weight that an index names. Raises `UnsupportedPipeline`."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UnsupportedPipeline(f"{index.parent.name}/{index.name} has no weight_map")
    if any(PurePosixPath(name).name != name for name in names.values()):
        raise UnsupportedPipeline(f"{index.parent.name}/{index.name} names files outside of its folder")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with or without a byte-order mark. Raises `UnsupportedPipeline`."""
    name = f"{path.parent.name}/{path.name}" if path.name != "model_index.json" else path.name
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UnsupportedPipeline(f"{path.parent.name}/ has no readable {path.name}") from error
    except RecursionError as error:
        raise UnsupportedPipeline(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise UnsupportedPipeline(f"{name} is no JSON file") from error
    if not isinstance(content, dict):
        raise UnsupportedPipeline(f"{name} is no JSON object")
    return content


def list_components(folder: Path) -> list[str]:
    """Return the components that `model_index.json` names. Raises `UnsupportedPipeline`, also for an unknown class."""
    index = read_json(folder / "model_index.json")
    find_family(index.get("_class_name"))
    return [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]]


def _read_components(folder: Path) -> tuple[list[str], tuple[EncoderDescription, ...]]:
    components = list_components(folder)
    family = find_family(read_json(folder / "model_index.json").get("_class_name"))
    for name in family.components:
        if name not in components or not (folder / name).is_dir():
            raise UnsupportedPipeline(f"the pipeline has no {name}/")
    for name in set(components) & set(WEIGHTS):
        find_weights(folder, name)
    return components, tuple(_describe_encoder(folder, spec) for spec in family.encoders)


def _describe_encoder(folder: Path, spec: EncoderSpec) -> EncoderDescription:
    whole = read_json(folder / spec.name / "config.json")
    config = whole.get("text_config", whole)  # of a model that also sees pictures
    known, found = _MODEL_TYPES[spec.kind], config.get("model_type", whole.get("model_type"))
    if known and found not in known:
        raise UnsupportedPipeline(f"{spec.name}/ is a {found}, which cannot be edited: only {', '.join(sorted(known))}")
    layers, width, mlp_width = _SIZES[spec.kind]
    try:
        return EncoderDescription(
            name=spec.name, layers=int(config[layers]), width=int(config[width]), mlp_width=int(config[mlp_width])
        )
    except (KeyError, TypeError, ValueError) as error:
        kind = _KINDS[spec.kind]
        raise UnsupportedPipeline(f"{spec.name}/config.json does not describe a {kind} text encoder") from error
