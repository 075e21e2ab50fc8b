"""Export updates as adapters: ΔW = B Aᵀ of every layer, exactly, without the weights that it is added to.

Tensors are float32, and both factors have equal norms: float32 then loses as little as possible. The scale is one.

Shapes: d width, m width of the keys, r rank.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from editing.encoders.base import TextEncoder
from editing.errors import UnsupportedPipeline
from editing.families.registry import FAMILIES
from editing.files import write_atomically
from editing.stage_two.update import LayerUpdate, Update

_KOHYA_FAMILIES = ("sd1", "sd2", "sdxl")
_KOHYA_PREFIXES = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_COMFYUI_MODULES = {
    "clip": "text_model.encoder.layers.{}.mlp.fc2",
    "t5": "encoder.block.{}.layer.1.DenseReluDense.wo",
    "decoder": "model.layers.{}.mlp.down_proj",
}
"""The module of an output matrix in ComfyUI's encoders."""
_COMFYUI_ENCODERS = {
    ("sd3", "text_encoder"): "clip_l",
    ("sd3", "text_encoder_2"): "clip_g",
    ("sd3", "text_encoder_3"): "t5xxl",
    ("flux", "text_encoder"): "clip_l",
    ("flux", "text_encoder_2"): "t5xxl",
    ("chroma", "text_encoder"): "t5xxl",
    ("pixart_alpha", "text_encoder"): "t5xxl",
    ("pixart_sigma", "text_encoder"): "t5xxl",
    ("auraflow", "text_encoder"): "pile_t5xl",
    ("qwen_image", "text_encoder"): "qwen25_7b",
    ("lumina2", "text_encoder"): "gemma2_2b",
    ("sana", "text_encoder"): "gemma2_2b",
}
"""The name of an encoder in ComfyUI, by family and component. Those of Qwen3 depend on its width."""
_COMFYUI_QWEN3 = {2560: "qwen3_4b", 4096: "qwen3_8b"}


def export_lora(updates: Update | Sequence[Update], path: str | Path) -> bool:
    """Write a pipeline's updates as one LoRA file. Return False if they change nothing.

    For SD 1.x, 2.x and SDXL, keys are kohya's, which diffusers' `load_lora_weights` and ComfyUI read:
    `lora_te_text_model_encoder_layers_{i}_mlp_fc2.lora_up/down.weight` and `.alpha`, or `lora_te1_…` and `lora_te2_…`
    for SDXL's two encoders. For any other family they are ComfyUI's own: `text_encoders.{encoder}.transformer.…`.
    """
    updates = [updates] if isinstance(updates, Update) else updates
    tensors: dict[str, Tensor] = {}
    for update in updates:
        for layer, change in update.layers.items():
            name = _name_module(update, layer, alone=len(updates) == 1)
            up, down = split_update(change)
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    if tensors:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), save(tensors, metadata={"format": "pt"}))
    return bool(tensors)


def export_adapter(encoder: TextEncoder, update: Update, folder: str | Path) -> bool:
    """Write an encoder's update as a PEFT adapter for transformers' `load_adapter`. Return False if it changes nothing.

    The folder gets `adapter_config.json` and `adapter_model.safetensors`. Modules have the names of the transformers
    version in use. Raises `UnsupportedPipeline` if layers differ in rank.
    """
    if not update.layers:
        return False
    names = {id(module): name for name, module in encoder.model.named_modules()}
    modules = {layer: names[id(encoder.output_matrix(layer))] for layer in update.layers}
    tensors: dict[str, Tensor] = {}
    for layer, change in update.layers.items():
        up, down = split_update(change)
        tensors[f"base_model.model.{modules[layer]}.lora_A.weight"] = down
        tensors[f"base_model.model.{modules[layer]}.lora_B.weight"] = up
    ranks = {change.b.shape[1] for change in update.layers.values()}
    if len(ranks) != 1:
        raise UnsupportedPipeline("the layers of the update differ in rank: they cannot be one adapter")
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules.values()),
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True).encode())
    write_atomically(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    return True


def split_update(change: LayerUpdate) -> tuple[Tensor, Tensor]:
    """Return the factors of ΔW = up @ down, (d, r) and (r, m) float32, of equal norms."""
    balance = (change.a.norm() / change.b.norm().clamp_min(1e-300)).sqrt()
    return (change.b * balance).float().contiguous(), (change.a / balance).T.float().contiguous()


def _name_module(update: Update, layer: int, *, alone: bool) -> str:
    if update.family in _KOHYA_FAMILIES:
        prefix = "lora_te" if alone else _KOHYA_PREFIXES[update.encoder]
        return f"{prefix}_text_model_encoder_layers_{layer}_mlp_fc2"
    width = update.layers[layer].b.shape[0]
    qwen3 = _COMFYUI_QWEN3.get(width, update.encoder)
    name = _COMFYUI_ENCODERS.get((update.family, update.encoder), qwen3)
    module = _COMFYUI_MODULES[FAMILIES[update.family].find_encoder(update.encoder).kind].format(layer)
    return f"text_encoders.{name}.transformer.{module}"
