"""Load the generator of a pipeline: only safetensors, only local files, no code from the folder."""

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel

from editing.errors import UnsupportedPipeline
from editing.families.family import Family
from editing.families.layout import CODE_SETTINGS, find_variant, find_weights, read_json
from editing.families.registry import find_family
from editing.families.sd import SDXL
from editing.files import without_marks
from editing.generators import autoencoder
from editing.generators.auraflow import AuraFlow
from editing.generators.autoencoder import Autoencoder
from editing.generators.chroma import Chroma
from editing.generators.diffusion import build_solver
from editing.generators.flow import FlowTransformer, build_flow_scheduler
from editing.generators.flux import Flux
from editing.generators.flux2 import Flux2Klein
from editing.generators.generator import Generator
from editing.generators.lumina2 import Lumina2
from editing.generators.pixart import PixArt
from editing.generators.qwen_image import QwenImage
from editing.generators.sana import Sana
from editing.generators.stable_diffusion_3 import StableDiffusion3
from editing.generators.transformer import Transformer
from editing.generators.unet import UNet
from editing.generators.z_image import ZImage


def load_generator(
    folder: Path, *, device: torch.device, dtype: torch.dtype, autoencoder_dtype: torch.dtype, compiled: bool = False
) -> Generator:
    """Load the generator of a pipeline's folder with its autoencoder and scheduler.

    `compiled` compiles the network at its first use, which takes minutes and pays off in a long-running worker. Raises
    `UnsupportedPipeline`.
    """
    kind = GENERATORS[_find_family(folder).name]
    load = load_unet if issubclass(kind, UNet) else partial(load_transformer, kind=kind)
    generator = load(folder, device=device, dtype=dtype, autoencoder_dtype=autoencoder_dtype)
    if compiled:
        generator.network.compile()
    return generator


def load_unet(folder: Path, *, device: torch.device, dtype: torch.dtype, autoencoder_dtype: torch.dtype) -> UNet:
    """Load a U-Net, in the channels-last layout on a GPU. That of SDXL also takes the picture's size."""
    network = load_network(folder / "unet", UNet2DConditionModel, device=device, dtype=dtype)
    family = _find_family(folder)
    if (network.config.addition_embed_type == "text_time") != (family is SDXL):
        raise UnsupportedPipeline(f"unet/ is not the U-Net of a {family.pipeline_class}")
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
    vae = load_autoencoder(folder / "vae", device=device, dtype=autoencoder_dtype)
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return UNet(
        network,
        vae,
        build_scheduler(folder),
        image_size=(height * vae.downscale, width * vae.downscale),
    )


def load_transformer(
    folder: Path, *, device: torch.device, dtype: torch.dtype, autoencoder_dtype: torch.dtype, kind: type[Transformer]
) -> Transformer:
    """Load the transformer of a family."""
    name, expected = read_json(folder / "transformer" / "config.json").get("_class_name"), kind.network_class.__name__
    if name != expected:
        raise UnsupportedPipeline(f"transformer/ has a {name}: this pipeline needs a {expected}")
    network = load_network(folder / "transformer", kind.network_class, device=device, dtype=dtype)
    vae = load_autoencoder(folder / "vae", device=device, dtype=autoencoder_dtype)
    size = kind.choose_image_size(network, vae, read_json(folder / "vae" / "config.json"))
    return kind(
        network,
        vae,
        build_scheduler(folder),
        image_size=(size, size),
        index=read_json(folder / "model_index.json"),
    )


def load_network(folder: Path, kind: type[Any], *, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the weights of a network of this class, in eval mode and without gradients. None on the meta device."""
    if device.type == "meta":
        return build_network(folder, kind)
    variant = find_variant(find_weights(folder.parent, folder.name))
    with without_marks(folder) as readable:
        network, found = kind.from_pretrained(
            readable,
            torch_dtype=dtype,
            variant=variant,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise UnsupportedPipeline(f"{folder.name}/ lacks {len(missing)} weights of its {kind.__name__}: {missing[0]}")
    return network.requires_grad_(False).eval().to(device)


def build_network(folder: Path, kind: type[Any]) -> Any:
    """Build a network of this class on the meta device. Raises `UnsupportedPipeline`."""
    settings = {key: value for key, value in read_json(folder / "config.json").items() if key not in CODE_SETTINGS}
    try:
        with torch.device("meta"):
            return kind.from_config(settings)
    except Exception as error:  # libraries raise many kinds for wrong settings
        raise UnsupportedPipeline(f"{folder.name}/config.json is not that of a {kind.__name__}: {error}") from error


def check_generator(folder: Path) -> Generator:
    """Build a pipeline's generator on the meta device, without weights. Raises `UnsupportedPipeline`."""
    meta = torch.device("meta")
    try:
        return load_generator(folder, device=meta, dtype=torch.float32, autoencoder_dtype=torch.float32)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedPipeline(f"the generator cannot be built of its configurations: {error}") from error


def build_scheduler(folder: Path) -> Any:
    """Return the scheduler of a pipeline's folder. Raises `UnsupportedPipeline`."""
    kind = GENERATORS[_find_family(folder).name]
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    return build_flow_scheduler(config) if issubclass(kind, FlowTransformer) else build_solver(config)


def find_autoencoder_class(folder: Path) -> type[Any]:
    """Return the class of an autoencoder's folder. Raises `UnsupportedPipeline`."""
    name = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    if name not in autoencoder.SUPPORTED:
        raise UnsupportedPipeline(f"a {name} cannot be used: only {', '.join(autoencoder.SUPPORTED)}")
    kind: type[Any] = getattr(diffusers, name)
    return kind


def load_autoencoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Load an autoencoder of a supported class. Raises `UnsupportedPipeline`."""
    kind, config = find_autoencoder_class(folder), read_json(folder / "config.json")
    if dtype == torch.float16 and config.get("force_upcast"):  # SDXL's autoencoder overflows in float16
        dtype = torch.float32
    return Autoencoder(load_network(folder, kind, device=device, dtype=dtype))


def _find_family(folder: Path) -> Family:
    return find_family(read_json(folder / "model_index.json").get("_class_name"))


GENERATORS: dict[str, type[UNet | Transformer]] = {
    "sd1": UNet,
    "sd2": UNet,
    "sdxl": UNet,
    "sd3": StableDiffusion3,
    "flux": Flux,
    "chroma": Chroma,
    "pixart_alpha": PixArt,
    "pixart_sigma": PixArt,
    "auraflow": AuraFlow,
    "z_image": ZImage,
    "flux2_klein": Flux2Klein,
    "qwen_image": QwenImage,
    "lumina2": Lumina2,
    "sana": Sana,
}
"""The generator of each family in `editing.families.registry`."""
