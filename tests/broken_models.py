"""Broken and unusual copies of a small pipeline, one for each kind of fault that people have met.

A maker changes a copy of a Stable Diffusion 1.x pipeline in place.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ENCODER = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 8065936\n"
BOM = "\ufeff"

Maker = Callable[[Path], None]


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def drop_last_layer(folder: Path) -> None:
    layers = json.loads((folder / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    change_tensors(folder / ENCODER, lambda t: {k: v for k, v in t.items() if f".layers.{layers - 1}." not in k})


def drop_tensor(file: str) -> Maker:
    return lambda folder: change_tensors(folder / file, lambda t: dict(sorted(t.items())[1:]))


def add_prefix(file: str, prefix: str) -> Maker:
    return lambda folder: change_tensors(folder / file, lambda t: {prefix + k: v for k, v in t.items()})


def widen_tensor(file: str) -> Maker:
    """Give the first matrix a column more."""

    def widen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(key for key, tensor in sorted(tensors.items()) if tensor.ndim == 2)
        return tensors | {key: torch.cat([tensors[key], tensors[key][:, :1]], dim=1)}

    return lambda folder: change_tensors(folder / file, widen)


def set_value(file: str, value: float) -> Maker:
    def set_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = sorted(tensors)[len(tensors) // 2]
        tensors[key].view(-1)[-1] = value
        return tensors

    return lambda folder: change_tensors(folder / file, set_one)


def quantize(file: str) -> Maker:
    def round_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}

    return lambda folder: change_tensors(folder / file, round_all)


def write_pointer(file: str) -> Maker:
    def run(folder: Path) -> None:
        (folder / file).write_text(POINTER)

    return run


def cut(file: str, share: float) -> Maker:
    def run(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return run


def write_pickle(file: str) -> Maker:
    """A pickle under the name of a safetensors file."""

    def run(folder: Path) -> None:
        (folder / file).write_bytes(pickle.dumps({"weight": list(range(100))}, protocol=2))

    return run


def add_layer_to_config(count: int) -> Maker:
    return lambda folder: change_json(folder / "text_encoder" / "config.json", num_hidden_layers=count)


def set_json(file: str, **fields: Any) -> Maker:
    return lambda folder: change_json(folder / file, **fields)


def nest_config(folder: Path) -> None:
    text = (folder / "unet" / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "unet" / "config.json").write_text(f'{text}, "extra": {"[" * 50_000}{"]" * 50_000}}}')


def fill_config(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", extra=" " * (5 << 20))


def name_component(name: str, entry: list[str | None]) -> Maker:
    def run(folder: Path) -> None:
        change_json(folder / "model_index.json", **{name: entry})
        (folder / name).mkdir(exist_ok=True)

    return run


def add_pickled_checker(folder: Path) -> None:
    name_component("safety_checker", ["stable_diffusion", "StableDiffusionSafetyChecker"])(folder)
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def add_adapter(folder: Path) -> None:
    (folder / "text_encoder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def make_fifo(file: str) -> Maker:
    def run(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return run


def link_to(file: str, target: str) -> Maker:
    def run(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return run


def grow_tokenizer(folder: Path) -> None:
    """Add a token for which the encoder has no embedding."""
    n = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<my-cat>": n}))


def add_token(folder: Path) -> None:
    """Add a token as older transformers save it, with its embedding."""
    grow_tokenizer(folder)
    n = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))

    def grow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(key for key in tensors if "token_embedding" in key)
        return tensors | {key: torch.cat([tensors[key], torch.full_like(tensors[key][:1], 0.5)])}

    change_tensors(folder / ENCODER, grow)
    change_json(folder / "text_encoder" / "config.json", vocab_size=n + 1)


def drop_length(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["model_max_length"]
    path.write_text(json.dumps(settings))


def keep_half_precision(folder: Path) -> None:
    for file in (ENCODER, UNET, VAE):
        change_tensors(folder / file, lambda t: {key: tensor.half() for key, tensor in t.items()})
        (folder / file).rename(folder / file.replace(".safetensors", ".fp16.safetensors"))


def split_encoder(folder: Path) -> None:
    tensors = load_file(folder / ENCODER)
    (folder / ENCODER).unlink()
    keys, files = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = {key: files[index % 2] for index, key in enumerate(keys)}
    for file in files:
        own = {key: tensors[key] for key in keys if names[key] == file}
        save_file(own, folder / "text_encoder" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))


def misname_part(folder: Path) -> None:
    split_encoder(folder)
    path = folder / "text_encoder" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = index["weight_map"]
    first = next(iter(names))
    names[first] = next(name for name in names.values() if name != names[first])
    path.write_text(json.dumps(index))


def add_marks(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        path.write_text(BOM + path.read_text())


BROKEN: dict[str, tuple[Maker, str]] = {
    "last layer missing": (
        drop_last_layer,
        r"text_encoder/model.safetensors has no .*layers\.3\..* and 15 more weights",
    ),
    "tensor of the U-Net missing": (drop_tensor(UNET), "unet/diffusion_pytorch_model.safetensors has no conv_in.bias"),
    "tensor of the autoencoder missing": (drop_tensor(VAE), "vae/diffusion_pytorch_model.safetensors has no "),
    "foreign prefix of the encoder": (add_prefix(ENCODER, "cond_stage_model."), "foreign prefix 'cond_stage_model.'"),
    "foreign prefix of the U-Net": (add_prefix(UNET, "_orig_mod."), "foreign prefix '_orig_mod.'"),
    "fewer layers in the config": (
        add_layer_to_config(3),
        "text_encoder/ has the weights .*layers.3.*, but fewer layers",
    ),
    "more layers in the config": (add_layer_to_config(5), r"text_encoder/model.safetensors has no .*layers\.4\."),
    "another shape in the encoder": (
        widen_tensor(ENCODER),
        r"text_encoder/model.safetensors has .* in the shape \[.*\]",
    ),
    "another shape in the U-Net": (widen_tensor(UNET), r"unet/diffusion_.* in the shape \[.*\]: config.json needs \["),
    "float8 encoder": (quantize(ENCODER), "text_encoder/model.safetensors has .* as F8_E4M3: quantized weights"),
    "float8 U-Net": (quantize(UNET), "unet/diffusion_pytorch_model.safetensors has .* as F8_E4M3: quantized weights"),
    "NaN": (set_value(ENCODER, float("nan")), "text_encoder/model.safetensors has NaN or infinity in "),
    "infinity": (set_value(VAE, float("inf")), "vae/diffusion_pytorch_model.safetensors has NaN or infinity in "),
    "git-lfs pointer": (write_pointer(UNET), "unet/.* is a pointer of git-lfs and not the weights: run git lfs pull"),
    "cut in the tensors": (cut(ENCODER, 0.9), r"text_encoder/model.safetensors is cut off: it has \d+ of \d+ bytes"),
    "cut in the header": (cut(ENCODER, 0.001), "text_encoder/model.safetensors is cut off: .* end within its header"),
    "empty file": (cut(VAE, 0), "vae/diffusion_pytorch_model.safetensors is no safetensors file: download it again"),
    "pickle under another name": (write_pickle(UNET), "unet/diffusion_pytorch_model.safetensors is a pickle"),
    "pickled safety checker": (add_pickled_checker, "safety_checker/ has its weights only as pickles"),
    "too many layers": (
        add_layer_to_config(10**6),
        "text_encoder/config.json sets num_hidden_layers to 1000000: at most 512",
    ),
    "too wide": (
        set_json("text_encoder/config.json", hidden_size=10**8),
        "sets hidden_size to 100000000: at most 131072",
    ),
    "a number that is none": (
        set_json("vae/config.json", scaling_factor=float("nan")),
        "vae/config.json sets scaling_factor",
    ),
    "too many steps": (
        set_json("scheduler/scheduler_config.json", num_train_timesteps=10**9),
        "1000000000 num_train_timesteps",
    ),
    "betas outside of 0 to 1": (set_json("scheduler/scheduler_config.json", beta_end=3.0), "betas outside of 0 to 1"),
    "unknown schedule": (
        set_json("scheduler/scheduler_config.json", beta_schedule="cosine"),
        "scheduler_config.json cannot be",
    ),
    "nested config": (nest_config, "unet/config.json is nested more than 32 deep"),
    "long config": (fill_config, r"vae/config.json has \d+ bytes: at most 4194304 are read"),
    "EDM": (
        set_json("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"),
        "noise of a EDMEulerScheduler is not",
    ),
    "EDM in the index": (
        name_component("scheduler", ["diffusers", "EDMEulerScheduler"]),
        "diffusers.EDMEulerScheduler as sched",
    ),
    "component of another library": (
        name_component("unet", ["my_code", "MyUNet"]),
        "my_code.MyUNet as unet: only UNet2DC",
    ),
    "unknown component": (
        name_component("watermarker", ["diffusers", "UNet2DConditionModel"]),
        "names watermarker, which a ",
    ),
    "encoder of another library": (
        name_component("text_encoder", ["my_code", "CLIPTextModel"]),
        "names no model of transf",
    ),
    "tokenizer of another library": (
        name_component("tokenizer", ["my_code", "CLIPTokenizer"]),
        "names no tokenizer of tr",
    ),
    "kernel of a repository": (
        set_json("text_encoder/config.json", attn_implementation="somebody/kernel"),
        "code of a repository: remove it",
    ),
    "quantization": (
        set_json("text_encoder/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "text_encoder/config.json has a quantization_config",
    ),
    "adapter": (
        add_adapter,
        "text_encoder/adapter_config.json: an adapter cannot be edited; merge it into the weights",
    ),
    "fifo as a config": (
        make_fifo("text_encoder/config.json"),
        "text_encoder/config.json is no regular file: remove it",
    ),
    "fifo as a model card": (make_fifo("README.md"), "README.md is no regular file: remove it"),
    "device": (link_to("vae/config.json", "/dev/zero"), "vae/config.json is no regular file: remove it"),
    "link to itself": (link_to("vae/config.json", "config.json"), "vae/config.json cannot be read: "),
    "tokenizer of another class": (
        name_component("tokenizer", ["transformers", "Qwen2Tokenizer"]),
        "tokenizer/ gives other tokens than a Qwen2Tokenizer of transformers for 'a photo of a cat'",
    ),
    "token without an embedding": (grow_tokenizer, r"tokenizer/ has \d+ tokens, and text_encoder/ has \d+"),
    "longer than the encoder": (
        set_json("tokenizer/tokenizer_config.json", model_max_length=99),
        "of 99, .* has 40 positions",
    ),
    "another part in the index": (
        misname_part,
        r"text_encoder/model-0000\d-of-00002.safetensors has no .*, which model.safet",
    ),
    "encoder of another model": (
        set_json("unet/config.json", cross_attention_dim=48),
        "in the shape .* config.json needs",
    ),
}
"""A maker for each kind, and the sentence of its refusal as a regular expression."""

UNUSUAL: dict[str, Maker] = {
    "half precision only": keep_half_precision,
    "encoder in two files": split_encoder,
    "byte-order marks": add_marks,
    "no length of the tokenizer": drop_length,
    "length of 10^30": set_json("tokenizer/tokenizer_config.json", model_max_length=int(1e30)),
    "added token as older transformers save it": add_token,
    "attention": set_json("text_encoder/config.json", attn_implementation="flash_attention_2"),
    "code of the model": set_json("text_encoder/config.json", auto_map={"AutoModel": "modeling.MyModel"}),
}
"""A maker for each kind that is supported beside the plain layout."""
