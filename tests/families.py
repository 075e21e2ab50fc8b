"""Text encoders and tokenizers of every family with random weights, in the layout and of the classes of the real ones.

No weight is at its initial value and every encoder of a pipeline has sizes of its own, so that a mix-up cannot pass.
Tokenizers are built here: most of their tokens are single letters.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.pipelines import LENGTH, write_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-<>()&\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def write_t5_tokenizer(folder: Path) -> int:
    """Write T5's tokenizer and return the size of its vocabulary."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [("▁a", -3.0), ("▁cat", -4.0), ("▁the", -4.0), ("ing", -5.0)]
    letters = [(letter, -6.0 - index / 100) for index, letter in enumerate(LETTERS.strip())]
    extra = [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
    tokenizer = T5Tokenizer(vocab=[*special, *words, *letters, *extra])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_chat_tokenizer(folder: Path, *, as_two_files: bool = False) -> int:
    """Write Qwen's tokenizer with a chat template, as one file or as Qwen-Image has it."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġc", "Ġca", "Ġcat"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=CHAT_TOKENS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    if as_two_files:
        added = {
            str(index): {"content": token, "special": not token.startswith("<t"), "normalized": False}
            for token, index in tokenizer.get_added_vocab().items()
        }
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "added_tokens_decoder": added,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokenizer)


def write_gemma_tokenizer(folder: Path) -> int:
    """Write Gemma's tokenizer, whose padding is at the left unless a pipeline moves it."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "▁c", "▁ca", "▁cat"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = GemmaTokenizer(
        vocab=vocabulary, merges=[("▁", "c"), ("▁c", "a"), ("▁ca", "t")], add_bos_token=True, padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def clip(*, projection: int | None = None, **sizes: int) -> Callable[[int], nn.Module]:
    def build(vocabulary: int) -> Any:
        plain: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
        config = CLIPTextConfig(
            **{**plain, **sizes},
            vocab_size=vocabulary,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            projection_dim=projection or 16,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
        return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)

    return build


def t5(*, feed_forward: str = "gated-gelu", multilingual: bool = False) -> Callable[[int], nn.Module]:
    def build(vocabulary: int) -> nn.Module:
        sizes: dict[str, Any] = {"d_model": 40, "d_kv": 8, "d_ff": 56, "num_layers": 5, "num_heads": 4}
        config, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
        built: nn.Module = model(config(vocab_size=vocabulary, feed_forward_proj=feed_forward, **sizes))
        return built

    return build


DECODER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}


def qwen3(*, layers: int) -> Callable[[int], nn.Module]:
    return lambda vocabulary: Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, num_hidden_layers=layers, **DECODER))


def llama(*, layers: int) -> Callable[[int], nn.Module]:
    return lambda vocabulary: LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **DECODER))


def gemma2(*, layers: int) -> Callable[[int], nn.Module]:
    return lambda vocabulary: Gemma2Model(
        Gemma2Config(vocab_size=vocabulary, num_hidden_layers=layers, query_pre_attn_scalar=8, **DECODER)
    )


def qwen_vl(*, layers: int) -> Callable[[int], nn.Module]:
    def build(vocabulary: int) -> Any:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        text = {**DECODER, "num_hidden_layers": layers, "vocab_size": vocabulary, "rope_parameters": rope}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
        text["hidden_size"], text["head_dim"] = 32, 8  # the rotary embedding takes their quotient
        vision["out_hidden_size"] = 32
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))

    return build


@dataclass(frozen=True)
class TinyText:
    """The text encoders of a pipeline and their tokenizers."""

    pipeline: str
    encoders: Mapping[str, Callable[[int], nn.Module]]
    tokenizers: Mapping[str, Callable[[Path], int]]
    generator: str = "transformer"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's `encode_prompt`."""


def _one(
    pipeline: str, encoder: Callable[[int], nn.Module], tokenizer: Callable[[Path], int], **options: Any
) -> TinyText:
    return TinyText(pipeline, {"text_encoder": encoder}, {"tokenizer": tokenizer}, options=options)


TEXTS: dict[str, TinyText] = {
    "sd3": TinyText(
        "StableDiffusion3Pipeline",
        {
            "text_encoder": clip(projection=12),
            "text_encoder_2": clip(projection=20, hidden_size=18, num_hidden_layers=6, intermediate_size=48),
            "text_encoder_3": t5(),
        },
        {"tokenizer": write_tokenizer, "tokenizer_2": write_tokenizer, "tokenizer_3": write_t5_tokenizer},
        options={"prompt_2": None, "prompt_3": None},
    ),
    "flux": TinyText(
        "FluxPipeline",
        {"text_encoder": clip(), "text_encoder_2": t5()},
        {"tokenizer": write_tokenizer, "tokenizer_2": write_t5_tokenizer},
        options={"prompt_2": None},
    ),
    "chroma": _one("ChromaPipeline", t5(), write_t5_tokenizer),
    "pixart_alpha": _one("PixArtAlphaPipeline", t5(feed_forward="relu"), write_t5_tokenizer),
    "pixart_sigma": _one("PixArtSigmaPipeline", t5(), write_t5_tokenizer),
    "auraflow": _one("AuraFlowPipeline", t5(multilingual=True), write_t5_tokenizer),
    "z_image": _one("ZImagePipeline", qwen3(layers=6), write_chat_tokenizer),
    "z_image-llama": _one("ZImagePipeline", llama(layers=7), write_chat_tokenizer),
    "flux2_klein": _one("Flux2KleinPipeline", qwen3(layers=29), write_chat_tokenizer),
    "qwen_image": _one(
        "QwenImagePipeline", qwen_vl(layers=5), lambda folder: write_chat_tokenizer(folder, as_two_files=True)
    ),
    "lumina2": _one("Lumina2Pipeline", gemma2(layers=5), write_gemma_tokenizer),
    "sana": _one("SanaPipeline", gemma2(layers=4), write_gemma_tokenizer),
}


def write_text_parts(folder: Path, name: str, *, seed: int = 0, shard_size: str = "1GB") -> Path:
    """Write the text encoders of a pipeline, with other components that have no weights."""
    tiny = TEXTS[name]
    index: dict[str, Any] = {"_class_name": tiny.pipeline, "_diffusers_version": "0.42.0"}
    sizes = {each: write(folder / each) for each, write in tiny.tokenizers.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for encoder, build in tiny.encoders.items():
            model: Any = randomize(build(sizes[encoder.replace("text_encoder", "tokenizer")]))
            model.save_pretrained(folder / encoder, max_shard_size=shard_size)
            index[encoder] = ["transformers", type(model).__name__]
    for tokenizer in tiny.tokenizers:
        settings = json.loads((folder / tokenizer / "tokenizer_config.json").read_text())
        index[tokenizer] = ["transformers", settings.get("tokenizer_class", "CLIPTokenizer")]
    for component in (tiny.generator, "vae"):
        (folder / component).mkdir()
        save_file({"none": torch.zeros(1)}, folder / component / "diffusion_pytorch_model.safetensors")
        (folder / component / "config.json").write_text("{}")
        index[component] = ["diffusers", "ModelMixin"]
    (folder / "scheduler").mkdir()
    index["scheduler"] = ["diffusers", "SchedulerMixin"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def randomize(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module.eval()
