"""Load the text encoders of a pipeline's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from editing.encoders.base import TextEncoder
from editing.encoders.clip import ClipEncoder
from editing.encoders.decoder import DecoderEncoder
from editing.encoders.t5 import T5Encoder
from editing.errors import UnsupportedPipeline
from editing.families.family import EncoderSpec
from editing.families.layout import CODE_SETTINGS, detect_family, find_variant, find_weights, read_json
from editing.families.registry import FAMILIES
from editing.files import without_marks
from editing.inspection.weights import check_surplus, describe_missing, describe_shape
from editing.prompts import PromptTokenizer

KINDS: dict[str, type[TextEncoder]] = {"clip": ClipEncoder, "t5": T5Encoder, "decoder": DecoderEncoder}


def load_encoders(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[TextEncoder, ...]:
    """Load the text encoders of a pipeline, in the order in which it has them: no gradients, in eval mode.

    Raises `UnsafePipeline` if there are only pickles and `UnsupportedPipeline` for another family.
    """
    folder = Path(folder)
    family = FAMILIES[detect_family(folder)]
    return tuple(load_encoder(folder, spec.name, device=device, dtype=dtype) for spec in family.encoders)


def load_encoder(
    folder: str | Path,
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    last_layer: int | None = None,
) -> TextEncoder:
    """Load one text encoder of a pipeline. Raises as `load_encoders` does.

    Without a `dtype` it has that of its configuration. On a CPU, weights of this dtype in the files are mapped into
    memory and read when they are used. Stage II computes in float64 and float32 in any case, with embeddings in the
    dtype of the weights.

    With `last_layer`, only the blocks up to it are loaded, which suffices for second moments and stage II of these
    layers. The encoder cannot encode prompts then.
    """
    folder = Path(folder)
    family = FAMILIES[detect_family(folder)]
    spec = family.find_encoder(name)
    weights = find_weights(folder, name)
    model_class = _find_class(read_json(folder / "model_index.json")[name], spec)
    config, n_layers = read_config(model_class, folder / name), None
    if last_layer is not None:
        model_class, n_layers = _drop_layers(model_class, config, last_layer)
    with without_marks(folder / name) as readable:
        model, found = model_class.from_pretrained(
            readable,
            config=config,
            dtype=dtype or "auto",
            variant=find_variant(weights),
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below
            output_loading_info=True,
        )
    _check_keys(model, weights, found)
    prepared: nn.Module = model.requires_grad_(False).eval().to(device)
    return _wrap_model(prepared, folder, spec, family=family.name, n_layers=n_layers)


def _check_keys(model: nn.Module, weights: Path, found: Mapping[str, Any]) -> None:
    """Raise `UnsupportedPipeline` if the weights are not those that the configuration describes.

    The library would fill the others with random numbers. `found` is what it says of its loading.
    """
    file = f"{weights.parent.name}/{weights.name}"
    if missing := sorted(found["missing_keys"]):
        raise UnsupportedPipeline(describe_missing(file, missing, found["unexpected_keys"]))
    for key, stored, expected in found["mismatched_keys"]:
        raise UnsupportedPipeline(describe_shape(file, key, stored, expected))
    check_surplus(weights.parent.name, model.state_dict(), found["unexpected_keys"])


def read_config(model_class: type[transformers.PreTrainedModel], folder: Path) -> Any:
    """Read a text encoder's configuration, without the settings that choose code or other files."""
    with without_marks(folder) as readable:
        config: Any = model_class.config_class.from_pretrained(readable, local_files_only=True)
    for name in CODE_SETTINGS:
        if name in vars(config):
            delattr(config, name)
    config._attn_implementation = None  # the library's own choice
    return config


def _drop_layers(
    model_class: type[transformers.PreTrainedModel], config: Any, last_layer: int
) -> tuple[type[transformers.PreTrainedModel], int]:
    """Let the configuration end with this layer. Return a class for it and the layers of the whole model."""
    text = getattr(config, "text_config", config)  # of a model that also sees pictures
    n_layers: int = text.num_hidden_layers
    text.num_hidden_layers = min(n_layers, last_layer + 1)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[: last_layer + 1]
    # The library would report every weight of the layers that are left out.
    members = {"_keys_to_ignore_on_load_unexpected": [".*"], "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), members), n_layers


def check_encoders(folder: Path) -> None:
    """Raise `UnsupportedPipeline` for a text encoder or a tokenizer that `load_encoders` cannot use.

    Reads no weights: the models are built on the meta device.
    """
    family = FAMILIES[detect_family(folder)]
    index = read_json(folder / "model_index.json")
    for spec in family.encoders:
        model_class = _find_class(index[spec.name], spec)
        try:
            with torch.device("meta"):
                model = model_class(read_config(model_class, folder / spec.name))
        except UnsupportedPipeline:
            raise
        except Exception as error:  # libraries raise many kinds for wrong settings
            raise UnsupportedPipeline(f"{spec.name}/config.json is not that of a {model_class.__name__}") from error
        _wrap_model(model, folder, spec, family=family.name)


def _wrap_model(
    model: nn.Module, folder: Path, spec: EncoderSpec, *, family: str, n_layers: int | None = None
) -> TextEncoder:
    tokenizer, negative = (
        PromptTokenizer.from_folder(folder / spec.tokenizer, format) if format else None
        for format in (spec.format, spec.negative)
    )
    assert tokenizer is not None
    return KINDS[spec.kind](
        model,
        tokenizer,
        name=spec.name,
        folder=folder / spec.name,
        family=family,
        negative_tokenizer=negative,
        n_layers=n_layers,
    )


def _find_class(entry: object, spec: EncoderSpec) -> type[transformers.PreTrainedModel]:
    """Return the class of `model_index.json`, which must be a model of transformers: no code of the folder runs."""
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    found = getattr(transformers, str(name), None)
    known = isinstance(entry, list) and entry[0] == "transformers"
    if not (known and isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnsupportedPipeline(f"model_index.json names no model of transformers for {spec.name}: {name!r}")
    return found
