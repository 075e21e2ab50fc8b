"""Complete Stable Diffusion pipelines with random weights, about 1 MB: they draw nothing, but run.

Each is in the layout and of the classes of its real family, only small. The two encoders of SDXL differ in every
shape, so that a mix-up of them cannot pass.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

Family = Literal["sd1", "sd2", "sdxl"]
LAYERS, WIDTH, MLP_WIDTH, LENGTH = 4, 32, 64, 40
LAYERS_1, LAYERS_2, WIDTH_2, MLP_WIDTH_2, PROJECTION = 5, 7, 48, 80, 24
EOS = "<|endoftext|>"


def write_pipeline(folder: Path, *, seed: int = 0, family: Family = "sd1") -> Path:
    """Write it in diffusers' layout; the same seed gives the same bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        by_family: dict[str, dict[str, Any]] = {
            "sd1": {},
            "sd2": {"hidden_act": "gelu"},
            "sdxl": {"num_hidden_layers": LAYERS_1},
        }
        vocabulary = write_tokenizer(folder / "tokenizer", pad_token="!" if family == "sd2" else EOS)
        CLIPTextModel(_config(vocabulary, **by_family[family])).save_pretrained(folder / "text_encoder")
        width, added = WIDTH, {}
        if family == "sdxl":
            write_tokenizer(folder / "tokenizer_2", pad_token="!")
            config = _config(
                vocabulary,
                hidden_size=WIDTH_2,
                intermediate_size=MLP_WIDTH_2,
                num_hidden_layers=LAYERS_2,
                projection_dim=PROJECTION,
                hidden_act="gelu",
            )
            CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
            width = WIDTH + WIDTH_2
            added = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + PROJECTION,
            }
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=4,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **added,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ).save_pretrained(folder / "vae")
    if family == "sdxl":
        EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ).save_pretrained(folder / "scheduler")
    else:
        prediction = "v_prediction" if family == "sd2" else "epsilon"
        DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type=prediction).save_pretrained(
            folder / "scheduler"
        )
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler" if family == "sdxl" else "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if family == "sdxl":
        index |= {
            "force_zeros_for_empty_prompt": True,
            "image_encoder": [None, None],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def make_old(folder: Path) -> Path:
    """Rewrite the text encoders as an old transformers saved them: keys with the prefix, `eos_token_id` 2."""
    for component in folder.glob("text_encoder*"):
        config = json.loads((component / "config.json").read_text())
        old = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "transformers_version": "4.25.0.dev0"}
        (component / "config.json").write_text(json.dumps({**config, **old}))
        weights = component / "model.safetensors"
        stored = {
            key if key.startswith("text_projection") else "text_model." + key.removeprefix("text_model."): tensor
            for key, tensor in load_file(weights).items()
        }
        stored["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
        save_file(stored, weights, metadata={"format": "pt"})
    return folder


def _config(vocabulary: int, **changes: Any) -> CLIPTextConfig:
    plain = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": WIDTH,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPTextConfig(**{**plain, **changes})


def write_tokenizer(folder: Path, *, pad_token: str = EOS) -> int:
    """CLIP's byte-pair tokenizer with no merges, so that each letter is a token; returns the vocabulary's size.

    "!" is its first token, as in CLIP's; a pad token other than EOS is named where Stability's folders name it.
    """
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *[letter + "</w>" for letter in alphabet], "<|startoftext|>", EOS]
    assert tokens[0] == "!"
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"model_max_length": LENGTH}
    if pad_token != EOS:
        special = {"bos_token": "<|startoftext|>", "eos_token": EOS, "pad_token": pad_token, "unk_token": EOS}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)


def write_clip(folder: Path) -> Path:
    """A CLIP model for pictures of 16 by 16 in the layout of a download."""
    vocabulary = write_tokenizer(folder)
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    config = CLIPConfig(
        text_config={**narrow, **ids, "vocab_size": vocabulary, "max_position_embeddings": LENGTH},
        vision_config={**narrow, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(37)  # with nearness on both sides of 0, and both preferences
        CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder
