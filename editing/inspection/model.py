"""Open a model once before it is registered: everything that editing and its users will read of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editing.encoders.base import Encoding, TextEncoder
from editing.encoders.load import check_encoders, load_encoder
from editing.errors import UnsupportedPipeline
from editing.families.conditions import join_encodings
from editing.families.layout import WEIGHTS, PipelineDescription, describe_pipeline, find_weights, list_components
from editing.families.registry import FAMILIES
from editing.generators.generator import Generator
from editing.generators.load import check_generator
from editing.inspection.components import check_components
from editing.inspection.folder import check_folder
from editing.inspection.tokenizers import check_tokenizers
from editing.inspection.weights import StoredTensor, check_dtypes, check_values, compare_with_network, read_tensors

PROMPT = "a photo of a cat"


def inspect_model(folder: str | Path, *, device: str | torch.device = "cpu") -> PipelineDescription:
    """Open a pipeline's folder and describe it.

    The headers of all weights are read and a sample of their values; configurations are bounded; networks are built
    without weights and compared with the headers; tokenizers are compared with those of transformers. Each text encoder
    encodes a prompt twice on `device`, one encoder at a time.

    Raises `UnsafePipeline` or `UnsupportedPipeline`. The message names the file.
    """
    folder = Path(folder)
    check_folder(folder)
    check_components(folder)
    weights = {name: find_weights(folder, name) for name in list_components(folder) if name in WEIGHTS}
    tensors = {name: read_tensors(path) for name, path in weights.items()}
    check_encoders(folder)
    generator = check_generator(folder)
    for name, network in ((generator.component, generator.network), ("vae", generator.autoencoder.model)):
        compare_with_network(network, weights[name], tensors[name])
    check_values([item for stored in tensors.values() for item in stored.items()])
    description = describe_pipeline(folder)
    family = FAMILIES[description.family]
    check_tokenizers(folder, family)
    encodings = [_encode_twice(folder, spec.name, tensors[spec.name], device=device) for spec in family.encoders]
    width = join_encodings(family.name, encodings).states.shape[-1]
    _check_width(generator, width)
    return description


def _encode_twice(folder: Path, name: str, tensors: dict[str, StoredTensor], *, device: str | torch.device) -> Encoding:
    """Encode a prompt twice with a text encoder. Raises `UnsupportedPipeline`."""
    for dtype in (None, torch.float32):
        encoder = load_encoder(folder, name, device=device, dtype=dtype)
        _check_encoder(encoder, tensors)
        try:
            with torch.no_grad():
                one, two = (encoder.encode_texts([PROMPT]) for _ in range(2))
        except (IndexError, RuntimeError, ValueError) as error:
            raise UnsupportedPipeline(f"{name}/ cannot encode a prompt: {error}") from error
        if all(state.isfinite().all() for state in _list_states(one)):
            break  # some encoders overflow in float16
    else:
        raise UnsupportedPipeline(f"{name}/ encodes {PROMPT!r} as NaN or infinity")
    if not all(map(torch.equal, _list_states(one), _list_states(two))):
        raise UnsupportedPipeline(f"{name}/ encodes {PROMPT!r} differently each time")
    return one


def _list_states(encoding: Encoding) -> list[Tensor]:
    return [*encoding.taps, *([] if encoding.pooled is None else [encoding.pooled])]


def _check_encoder(encoder: TextEncoder, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise `UnsupportedPipeline` for quantized weights, or for a tokenizer that is not the encoder's."""
    check_dtypes({key: tensor for key, tensor in tensors.items() if key.endswith("weight")})
    model: Any = encoder.model
    rows, tokens = len(model.get_input_embeddings().weight), encoder.tokenizer.vocabulary_size
    if tokens > rows:
        raise UnsupportedPipeline(
            f"{encoder.spec.tokenizer}/ has {tokens} tokens, and {encoder.name}/ has {rows}: they are not of one model"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if encoder.spec.kind == "clip" and positions is not None and encoder.tokenizer.max_length > positions:
        raise UnsupportedPipeline(
            f"{encoder.spec.tokenizer}/tokenizer_config.json has a model_max_length of {encoder.tokenizer.max_length}, "
            f"and {encoder.name}/config.json has {positions} positions"
        )


def _check_width(generator: Generator, width: int) -> None:
    """Raise `UnsupportedPipeline` if the generator does not read states of this width."""
    for name, projection in generator.text_projections.items():
        if projection.in_features != width:
            raise UnsupportedPipeline(
                f"{generator.component}/ reads states of width {projection.in_features} with {name}, and the text "
                f"encoders give {width}: they are not of one model"
            )
