"""Write what was found as files: the whole text encoder, its exact low-rank update as a LoRA adapter, the U-Net."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from editing.encoders.clip import EditableEncoder
from editing.errors import UnsupportedPipeline
from editing.families.layout import UNET_INDEX, WEIGHTS, find_weights
from editing.files import replace_atomically, write_atomically
from editing.pipelines import EditablePipeline
from editing.stage_two.update import Update
from editing.uce.cross_attention import CrossAttentionUpdate

PREFIX = "text_model."
_LORA_OF_TWO = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def export_text_encoder(encoder: EditableEncoder, update: Update, folder: str | Path) -> tuple[Path, ...]:
    """Write `config.json` and `model.safetensors` into the encoder's own folder in a folder; returns their paths.

    The base file is copied tensor by tensor, bit for bit and in its own dtype; only fc2.weight of the edited layers
    differs, rounded once from float64. Keys have the `text_model.` prefix whatever transformers is installed: loaders
    that expect it otherwise keep random weights with no more than a warning. Equal inputs give equal bytes.
    """
    if encoder.folder is None:
        raise UnsupportedPipeline("this encoder was not loaded from a folder, so there is no base file to edit")
    weights = read_base(encoder.folder / WEIGHTS[encoder.name])
    for layer, change in update.layers.items():
        key = f"{PREFIX}encoder.layers.{layer}.mlp.fc2.weight"
        base = weights[key]
        weights[key] = (base.double() + change.dense().cpu()).to(base.dtype)
    target = Path(folder) / encoder.name
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "config.json", (encoder.folder / "config.json").read_bytes())
    # One metadata key, the one that transformers asks for: with two, safetensors orders them anew at each save.
    write_atomically(target / "model.safetensors", save(weights, metadata={"format": "pt"}))
    return target / "config.json", target / "model.safetensors"


def export_lora(update: Update | Sequence[Update], path: str | Path) -> bool:
    """Write ΔW = B Aᵀ of every layer as a LoRA adapter that diffusers and ComfyUI load; False if there is none.

    Keys are kohya's, `lora_te_text_model_encoder_layers_{i}_mlp_fc2.lora_up/down.weight` and `.alpha`, alpha being
    the rank, so that the scale is one; of SDXL, whose two updates go into one file, `lora_te1_…` and `lora_te2_…`.
    float32; up and down of equal norm.
    """
    updates = [update] if isinstance(update, Update) else update
    tensors: dict[str, Tensor] = {}
    for part in updates:
        tensors |= lora_tensors(part, prefix=_LORA_OF_TWO[part.encoder] if len(updates) > 1 else "lora_te")
    if tensors:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), save(tensors, metadata={"format": "pt"}))
    return bool(tensors)


@contextmanager
def load_temporarily(module: nn.Module, path: str | Path) -> Iterator[None]:
    """The module with the weights of a safetensors file, in the module's dtype; on leaving, its own, bit for bit.

    Keys may have the prefix `text_model.` or not, whichever the module has. Only tensors that differ are held twice.
    Raises `UnsupportedPipeline` where the file does not fit the module.
    """
    own = {key.removeprefix(PREFIX): tensor for key, tensor in module.state_dict().items()}
    before: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in file.keys():
                key = name.removeprefix(PREFIX)
                if key.endswith("position_ids"):  # a buffer that old files have
                    continue
                given = file.get_tensor(name)
                if key not in own or own[key].shape != given.shape:
                    raise UnsupportedPipeline(f"{Path(path).name} is of another architecture: it has {name}")
                given = given.to(own[key])
                if not torch.equal(own[key], given):
                    before[key] = own[key].clone()
                    own[key].copy_(given)
        yield
    finally:
        with torch.no_grad():
            for key, tensor in before.items():
                own[key].copy_(tensor)


@contextmanager
def load_components_temporarily(pipeline: EditablePipeline, files: Iterable[tuple[str, str | Path]]) -> Iterator[None]:
    """The pipeline with the weights of these files, each with the name of its component; on leaving, with its own."""
    modules: dict[str, nn.Module] = {encoder.name: encoder.model for encoder in pipeline.encoders}
    with ExitStack() as stack:
        for component, path in files:
            module = modules.get(component) or getattr(pipeline, component)
            stack.enter_context(load_temporarily(module, path))
        yield


def export_unet(pipeline: EditablePipeline, update: CrossAttentionUpdate, folder: str | Path) -> tuple[Path, ...]:
    """Write `unet/` into a folder: the configuration and the weights, in as many files as the base has; returns them.

    Each file is the base's, byte for byte, but for the keys' and values' projections, which keep their dtype and are
    rounded to it once from float64. Equal inputs give equal bytes. One tensor at a time is held in memory.
    """
    if pipeline.folder is None:
        raise UnsupportedPipeline("this pipeline was not loaded from a folder, so there is no base file to edit")
    found = find_weights(pipeline.folder, "unet")
    parts, copied = [found], ["config.json"]
    if found.name == UNET_INDEX:
        parts = sorted(found.parent.glob("diffusion_pytorch_model-*-of-*.safetensors"))
        copied.append(UNET_INDEX)
    target = Path(folder) / "unet"
    target.mkdir(parents=True, exist_ok=True)
    missing = {f"{name}.weight" for name in update.relative_norms}
    for part in parts:
        with replace_atomically(target / part.name) as temporary:
            shutil.copyfile(part, temporary)
            missing -= _rewrite(temporary, update, missing)
    if missing:
        raise UnsupportedPipeline(f"unet/ has no {min(missing)}")
    for name in copied:
        write_atomically(target / name, (found.parent / name).read_bytes())
    return tuple(target / name for name in (*copied, *(part.name for part in parts)))


def _rewrite(path: Path, update: CrossAttentionUpdate, keys: set[str]) -> set[str]:
    """Put the edited weights in the place of those of these keys that the safetensors file has; returns which."""
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        held = keys & header.keys()
        with safe_open(path, framework="pt") as tensors:
            for key in sorted(held):
                weight = tensors.get_tensor(key)
                edited = (weight.double() + update.dense(weight)).to(weight.dtype)
                file.seek(start + header[key]["data_offsets"][0])
                file.write(edited.contiguous().view(torch.uint8).numpy().tobytes())
    return held


def lora_tensors(update: Update, *, prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, change in update.layers.items():
        name = f"{prefix}_text_model_encoder_layers_{layer}_mlp_fc2"
        balance = (change.a.norm() / change.b.norm().clamp_min(1e-300)).sqrt()
        tensors[f"{name}.lora_up.weight"] = (change.b * balance).float().contiguous()  # (d, rank)
        tensors[f"{name}.lora_down.weight"] = (change.a / balance).T.float().contiguous()  # (rank, m)
        tensors[f"{name}.alpha"] = torch.tensor(float(change.b.shape[1]))
    return tensors


def read_base(path: Path) -> dict[str, Tensor]:
    """The tensors of a base text encoder's file, as they are, under keys with the prefix."""
    with safe_open(path, framework="pt") as file:
        return {_prefixed(key): file.get_tensor(key) for key in file.keys()}


def _prefixed(key: str) -> str:
    bare = key.removeprefix(PREFIX)
    return PREFIX + bare if bare.split(".")[0] in ("embeddings", "encoder", "final_layer_norm") else key
