"""Load the text encoders of a pipeline's folder."""

from pathlib import Path

import torch
import transformers
from torch import nn

from editing.encoders.base import TextEncoder
from editing.encoders.clip import ClipEncoder
from editing.encoders.decoder import DecoderEncoder
from editing.encoders.t5 import T5Encoder
from editing.errors import UnsupportedPipeline
from editing.families.family import EncoderSpec
from editing.families.layout import detect_family, find_weights, read_json
from editing.families.registry import FAMILIES
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
    index = read_json(folder / "model_index.json")
    encoders = []
    for spec in family.encoders:
        find_weights(folder, spec.name)
        model_class = _find_class(index[spec.name], spec)
        model = model_class.from_pretrained(
            folder / spec.name, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        prepared: nn.Module = model.requires_grad_(False).eval().to(device)
        encoders.append(_wrap_model(prepared, folder, spec, family=family.name))
    return tuple(encoders)


def check_encoders(folder: Path) -> None:
    """Raise `UnsupportedPipeline` for a text encoder or a tokenizer that `load_encoders` cannot use.

    Reads no weights: the models are built on the meta device.
    """
    family = FAMILIES[detect_family(folder)]
    index = read_json(folder / "model_index.json")
    for spec in family.encoders:
        model_class = _find_class(index[spec.name], spec)
        try:
            config = model_class.config_class.from_pretrained(folder / spec.name, local_files_only=True)
            with torch.device("meta"):
                model = model_class(config)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise UnsupportedPipeline(f"{spec.name}/config.json is not that of a {model_class.__name__}") from error
        _wrap_model(model, folder, spec, family=family.name)


def _wrap_model(model: nn.Module, folder: Path, spec: EncoderSpec, *, family: str) -> TextEncoder:
    tokenizer, negative = (
        PromptTokenizer.from_folder(folder / spec.tokenizer, format) if format else None
        for format in (spec.format, spec.negative)
    )
    assert tokenizer is not None
    return KINDS[spec.kind](
        model, tokenizer, name=spec.name, folder=folder / spec.name, family=family, negative_tokenizer=negative
    )


def _find_class(entry: object, spec: EncoderSpec) -> type[transformers.PreTrainedModel]:
    """Return the class of `model_index.json`, which must be a model of transformers: no code of the folder runs."""
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnsupportedPipeline(f"model_index.json names no model of transformers for {spec.name}: {name!r}")
    return found
