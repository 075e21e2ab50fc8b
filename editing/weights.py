"""Export edits as files: the whole text encoder, its exact low-rank update as a LoRA adapter, the U-Net."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from editing.encoders.base import TextEncoder
from editing.errors import UnsupportedPipeline
from editing.families.layout import INDEX, find_weights, list_parts
from editing.files import replace_atomically, write_atomically
from editing.pipelines import EditablePipeline
from editing.restore import restore_weights
from editing.stage_two.update import Update
from editing.uce.projections import ProjectionUpdate

PREFIX = "text_model."
_LORA_PREFIXES = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def export_text_encoder(encoder: TextEncoder, update: Update, folder: str | Path) -> tuple[Path, ...]:
    """Write the encoder's `config.json` and `model.safetensors` below `folder` and return their paths.

    The base file is copied tensor by tensor, bit for bit and in its own dtype. Only fc2.weight of the edited layers
    differs, rounded once from float64. Keys have the prefix `text_model.` for every transformers version: older
    loaders that do not find it keep random weights with only a warning. Equal inputs give equal bytes.
    """
    if encoder.folder is None:
        raise UnsupportedPipeline("the encoder was not loaded from a folder: there is no base file to edit")
    weights = read_base(encoder.folder / "model.safetensors")
    for layer, change in update.layers.items():
        key = f"{PREFIX}encoder.layers.{layer}.mlp.fc2.weight"
        base = weights[key]
        weights[key] = (base.double() + change.to_dense().cpu()).to(base.dtype)
    target = Path(folder) / encoder.name
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "config.json", (encoder.folder / "config.json").read_bytes())
    # transformers requires this one metadata key. safetensors would write several in random order.
    write_atomically(target / "model.safetensors", save(weights, metadata={"format": "pt"}))
    return target / "config.json", target / "model.safetensors"


def export_lora(update: Update | Sequence[Update], path: str | Path) -> bool:
    """Write ΔW = B Aᵀ of every layer as a LoRA adapter for diffusers and ComfyUI. Return False if there is none.

    Keys are kohya's, `lora_te_text_model_encoder_layers_{i}_mlp_fc2.lora_up/down.weight` and `.alpha`. Alpha is the
    rank, so that the scale is one. SDXL's two updates go into one file with `lora_te1_…` and `lora_te2_…`. Tensors are
    float32; up and down have equal norms.
    """
    updates = [update] if isinstance(update, Update) else update
    tensors: dict[str, Tensor] = {}
    for own in updates:
        tensors |= build_lora_tensors(own, prefix=_LORA_PREFIXES[own.encoder] if len(updates) > 1 else "lora_te")
    if tensors:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), save(tensors, metadata={"format": "pt"}))
    return bool(tensors)


@contextmanager
def load_temporarily(module: nn.Module, path: str | Path) -> Iterator[None]:
    """Load a safetensors file into a module, in the module's dtype, and restore its weights on exit, bit for bit.

    Keys may have the prefix `text_model.` or not. Only tensors that differ are copied. Raises `UnsupportedPipeline` if
    the file does not fit the module.
    """
    own = {key.removeprefix(PREFIX): tensor for key, tensor in module.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        changed = {}
        for name in file.keys():
            key = name.removeprefix(PREFIX)
            if key.endswith("position_ids"):  # a buffer of old files
                continue
            tensor = file.get_tensor(name)
            if key not in own or own[key].shape != tensor.shape:
                raise UnsupportedPipeline(f"{Path(path).name} has {name}, which does not fit the module")
            if not torch.equal(own[key], tensor.to(own[key])):
                changed[name] = own[key]
        with restore_weights(changed.values()):
            with torch.no_grad():
                for name, weight in changed.items():
                    weight.copy_(file.get_tensor(name).to(weight))
            yield


@contextmanager
def load_components_temporarily(pipeline: EditablePipeline, files: Iterable[tuple[str, str | Path]]) -> Iterator[None]:
    """Load files into a pipeline, each given with its component's name, and restore its weights on exit."""
    modules: dict[str, nn.Module] = {encoder.name: encoder.model for encoder in pipeline.encoders}
    modules[pipeline.generator.component] = pipeline.generator.network
    with ExitStack() as stack:
        for component, path in files:
            stack.enter_context(load_temporarily(modules[component], path))
        yield


def export_generator(pipeline: EditablePipeline, update: ProjectionUpdate, folder: str | Path) -> tuple[Path, ...]:
    """Write `unet/` or `transformer/` below `folder`: the configuration and the weights, in as many files as the base.

    Each file equals the base's byte for byte except for the text projections, which are rounded once from float64 to
    their dtype. Equal inputs give equal bytes. Memory holds one tensor at a time. Returns the paths.
    """
    if pipeline.folder is None:
        raise UnsupportedPipeline("the pipeline was not loaded from a folder: there is no base file to edit")
    component = pipeline.generator.component
    weights = find_weights(pipeline.folder, component)
    parts, copied = list_parts(weights), ["config.json"]
    if weights.name.endswith(INDEX):
        copied.append(weights.name)
    target = Path(folder) / component
    target.mkdir(parents=True, exist_ok=True)
    missing = {f"{name}.weight" for name in update.relative_norms}
    for part in parts:
        with replace_atomically(target / part.name) as temporary:
            shutil.copyfile(part, temporary)
            missing -= _rewrite_weights(temporary, update, missing)
    if missing:
        raise UnsupportedPipeline(f"{component}/ has no {min(missing)}")
    for name in copied:
        write_atomically(target / name, (weights.parent / name).read_bytes())
    return tuple(target / name for name in (*copied, *(part.name for part in parts)))


def _rewrite_weights(path: Path, update: ProjectionUpdate, keys: set[str]) -> set[str]:
    """Overwrite in place those of these weights that the safetensors file has. Return their keys."""
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        present = keys & header.keys()
        with safe_open(path, framework="pt") as tensors:
            for key in sorted(present):
                weight = tensors.get_tensor(key)
                edited = (weight.double() + update.to_dense(weight)).to(weight.dtype)
                file.seek(start + header[key]["data_offsets"][0])
                file.write(edited.contiguous().view(torch.uint8).numpy().tobytes())
    return present


def build_lora_tensors(update: Update, *, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA adapter under kohya's names."""
    tensors: dict[str, Tensor] = {}
    for layer, change in update.layers.items():
        name = f"{prefix}_text_model_encoder_layers_{layer}_mlp_fc2"
        # Scale both factors to equal norms: float32 then loses as little as possible.
        balance = (change.a.norm() / change.b.norm().clamp_min(1e-300)).sqrt()
        tensors[f"{name}.lora_up.weight"] = (change.b * balance).float().contiguous()  # (d, rank)
        tensors[f"{name}.lora_down.weight"] = (change.a / balance).T.float().contiguous()  # (rank, m)
        tensors[f"{name}.alpha"] = torch.tensor(float(change.b.shape[1]))
    return tensors


def read_base(path: Path) -> dict[str, Tensor]:
    """Read a base text encoder's tensors unchanged, with the prefix in their keys."""
    with safe_open(path, framework="pt") as file:
        return {_add_prefix(key): file.get_tensor(key) for key in file.keys()}


def _add_prefix(key: str) -> str:
    bare = key.removeprefix(PREFIX)
    return PREFIX + bare if bare.split(".")[0] in ("embeddings", "encoder", "final_layer_norm") else key
