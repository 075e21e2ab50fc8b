"""Check the components that a model's `model_index.json` names: no code of the folder runs."""

import inspect
from pathlib import Path

import diffusers
import transformers

from editing.errors import UnsupportedPipeline
from editing.families.layout import detect_family, read_json
from editing.families.registry import FAMILIES
from editing.generators import autoencoder, diffusion, flow
from editing.generators.load import GENERATORS
from editing.generators.unet import UNet

_OPTIONAL = {
    "safety_checker": (("stable_diffusion", "StableDiffusionSafetyChecker"),),
    "feature_extractor": (
        ("transformers", "CLIPFeatureExtractor"), ("transformers", "CLIPImageProcessor"),
        ("transformers", "SiglipImageProcessor"),
    ),
    "image_encoder": (("transformers", "CLIPVisionModelWithProjection"), ("transformers", "SiglipVisionModel")),
}  # fmt: skip
"""Components that editing does not need, and the classes that they may have."""


def check_components(folder: Path) -> None:
    """Raise `UnsupportedPipeline` for a component that the pipeline does not have, or of a class that is not known."""
    index = read_json(folder / "model_index.json")
    family = FAMILIES[detect_family(folder)]
    accepted = inspect.signature(getattr(diffusers, family.pipeline_class).__init__).parameters
    kind = GENERATORS[family.name]
    network = "UNet2DConditionModel" if issubclass(kind, UNet) else kind.network_class.__name__
    schedulers = flow.SCHEDULERS if issubclass(kind, flow.FlowTransformer) else diffusion.SCHEDULERS
    known = {
        family.generator: {("diffusers", network)},
        "vae": {("diffusers", name) for name in autoencoder.SUPPORTED},
        "scheduler": {("diffusers", name) for name in schedulers},
        **{name: set(classes) for name, classes in _OPTIONAL.items()},
    }
    for name, entry in index.items():
        if not isinstance(entry, list) or not any(entry):
            continue
        pair = tuple(map(str, entry))
        if name not in accepted or len(pair) != 2:
            raise UnsupportedPipeline(f"model_index.json names {name}, which a {family.pipeline_class} does not have")
        if name in known and pair not in known[name]:
            classes = ", ".join(sorted(each for _, each in known[name]))
            raise UnsupportedPipeline(f"model_index.json has {'.'.join(pair)} as {name}: only {classes} can be used")
        if name.startswith("tokenizer"):
            find_tokenizer_class(pair, name)
        if not (folder / name).is_dir():
            raise UnsupportedPipeline(f"model_index.json names {name}, but the pipeline has no {name}/")


def find_tokenizer_class(entry: object, name: str) -> type[transformers.PreTrainedTokenizerBase]:
    """Return the class of a tokenizer in `model_index.json`. Raises `UnsupportedPipeline`."""
    library, kind = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    found = getattr(transformers, str(kind), None) if library == "transformers" else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)):
        raise UnsupportedPipeline(f"model_index.json names no tokenizer of transformers for {name}: {kind!r}")
    return found
