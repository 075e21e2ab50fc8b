"""The parts of the pipeline, how its encoders' outputs are joined, and its folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from demo.llm.build import load_autoencoder

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LATENT_SIDE = 8
CLIP_LENGTH = 24
T5_LENGTH = 32
"""Tokens of T5 in the demo's own calls: enough for every caption."""
PIPELINE_LENGTH = 256
"""Tokens of T5 in a call of the pipeline that names no other number."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the networks. T5 is at least as wide as both CLIPs together."""

    clip: tuple[int, int] = (96, 6)  # width and layers
    clip_2: tuple[int, int] = (128, 6)
    t5: tuple[int, int] = (256, 5)
    t5_mlp: int = 512
    transformer: tuple[int, int] = (160, 6)
    head: int = 32  # channels of a head


class Networks(nn.Module):
    """All that is trained: the text encoders, in the pipeline's order and by its names, and the transformer."""

    def __init__(self, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, shape: Shape = Shape()) -> None:
        super().__init__()
        self.text_encoder = _build_clip(clip_tokenizer, *shape.clip, shape.head, "quick_gelu")
        self.text_encoder_2 = _build_clip(clip_tokenizer, *shape.clip_2, shape.head, "gelu")
        width, layers = shape.t5
        self.text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer),
                d_model=width,
                d_kv=shape.head,
                d_ff=shape.t5_mlp,
                num_layers=layers,
                num_heads=width // (2 * shape.head),
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        width, layers = shape.transformer
        self.transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIDE,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=shape.head,
            num_attention_heads=width // shape.head,
            joint_attention_dim=shape.t5[0],
            caption_projection_dim=width,
            pooled_projection_dim=shape.clip[0] + shape.clip_2[0],
            pos_embed_max_size=LATENT_SIDE // 2,
            qk_norm="rms_norm",
        )

    def read(self, folder: Path) -> None:
        """Read the weights of a pipeline's folder. Raises RuntimeError where they have other shapes."""
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        for name in (*ENCODERS, "transformer"):
            getattr(self, name).load_state_dict(getattr(pipeline, name).state_dict())

    def encode(self, clip_ids: Tensor, t5_ids: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return states (n, 24 + t, width) and the pooled output (n, width) of token ids (n, 24) and (n, t).

        `kept` (n, 3) is 0 for an encoder whose output is replaced by zeros.
        """
        first, second = (
            encoder(clip_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)
        )
        states, states_2, states_3 = first.hidden_states[-2], second.hidden_states[-2], self.text_encoder_3(t5_ids)[0]
        pooled, pooled_2 = first.text_embeds, second.text_embeds
        if kept is not None:
            one, two, three = kept.to(states.dtype).unbind(1)
            states, states_2, states_3 = (
                read * share[:, None, None] for read, share in ((states, one), (states_2, two), (states_3, three))
            )
            pooled, pooled_2 = pooled * one[:, None], pooled_2 * two[:, None]
        both = torch.cat([states, states_2], dim=-1)
        both = F.pad(both, (0, states_3.shape[-1] - both.shape[-1]))
        return torch.cat([both, states_3.to(both.dtype)], dim=1), torch.cat([pooled, pooled_2], dim=-1)

    def predict(self, noisy: Tensor, sigmas: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """Return ε - x₀ (n, 4, 8, 8) of noisy latents at σ (n,)."""
        states, pooled = condition
        predicted: Tensor = self.transformer(
            hidden_states=noisy, encoder_hidden_states=states, pooled_projections=pooled, timestep=1000 * sigmas
        ).sample
        return predicted


def _build_clip(
    tokenizer: CLIPTokenizer, width: int, layers: int, head: int, activation: str
) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // head,
            max_position_embeddings=CLIP_LENGTH,
            projection_dim=width,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save_pipeline(
    networks: Networks, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, folder: Path
) -> None:
    """Write the folder in float16, with the emoji model's autoencoder. `from_pretrained` loads it as it is."""
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=load_autoencoder(),
        text_encoder=networks.text_encoder,
        text_encoder_2=networks.text_encoder_2,
        text_encoder_3=networks.text_encoder_3,
        tokenizer=clip_tokenizer,
        tokenizer_2=clip_tokenizer,
        tokenizer_3=t5_tokenizer,
        transformer=networks.transformer,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ENCODERS:  # transformers loads in the dtype of a configuration, diffusers does not
        _change_config(folder / name / "config.json", dtype="float32")
    _change_config(folder / "vae" / "config.json", _name_or_path="emoji")  # else the path on this machine


def _change_config(file: Path, **changed: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8")) | changed
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
