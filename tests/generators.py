"""Generators of every family with random weights, a few kB each, in the layout and of the classes of the real ones.

Every size differs from the others, and masks, pads and shifts are never trivial, so that a mix-up cannot pass.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from editing.condition import Condition
from editing.encoders.load import load_encoders
from editing.families.conditions import encode_prompts
from tests.families import write_text_parts

IMAGE = 16
LENGTH, WIDTH, POOLED = 6, 24, 20
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


@dataclass(frozen=True)
class TinyFamily:
    """How a pipeline is built and called."""

    pipeline: str
    transformer: Callable[[int, int], nn.Module]
    """Takes the width of the states that it reads, and of the pooled output."""
    scheduler: Callable[[], Any]
    vae: Callable[[], nn.Module]
    image: int = IMAGE
    """Height and width in pixels."""
    guidance: str = "guidance_scale"
    """The argument of guidance."""
    unguided: float = 1.0
    """Its value without guidance."""
    mask: str | None = None
    """The argument of the mask, if the pipeline takes one."""
    mask_dtype: torch.dtype = torch.bool
    """As `encode_prompt` gives it. A mask of numbers is added to the scores of attention and hides nothing."""
    has_pooled: bool = False
    has_negative: bool = True
    takes_lists: bool = False
    """Whether prompts are lists of states without padding."""
    masks_states: bool = False
    """Whether `encode_prompt` sets the states of the padding to 0."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the call."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other entries of `model_index.json`."""

    @property
    def has_mask(self) -> bool:
        """Whether the condition has a mask."""
        return self.takes_lists or (self.mask is not None and not self.masks_states)

    def write(
        self, folder: Path, *, width: int = WIDTH, pooled: int = POOLED, shard_size: str = "1GB", seed: int = 0
    ) -> Path:
        """Write the pipeline's generator in diffusers' layout; the same bytes each time."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer, vae = _randomize(self.transformer(width, pooled)), _randomize(self.vae())
        scheduler = self.scheduler()
        transformer.save_pretrained(folder / "transformer", max_shard_size=shard_size)
        vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": self.image}))
        parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
        index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
        path = folder / "model_index.json"
        before = json.loads(path.read_text()) if path.exists() else {"_class_name": self.pipeline}
        path.write_text(json.dumps({**before, **index, **self.settings}, indent=2))
        return folder

    def load(self, folder: Path) -> Any:
        """Load diffusers' own pipeline, without text encoders."""
        kind = getattr(diffusers, self.pipeline)
        parts = {
            "transformer": self.transformer_class.from_pretrained(folder / "transformer"),
            "vae": self.vae_class.from_pretrained(folder / "vae"),
            "scheduler": self.scheduler_class.from_pretrained(folder / "scheduler"),
        }
        expected = set(inspect.signature(kind.__init__).parameters) - {"self", *parts, *self.settings}
        pipeline = kind(**parts, **dict.fromkeys(expected), **self.settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def transformer_class(self) -> Any:
        return type(self.transformer(WIDTH, POOLED))

    @property
    def vae_class(self) -> Any:
        return type(self.vae())

    @property
    def scheduler_class(self) -> Any:
        return type(self.scheduler())

    def draw_condition(self, *, seed: int, prompts: int = 1, length: int = LENGTH) -> Condition:
        """Draw a random condition. Where the family has a mask, the last third of the positions is padding."""
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(prompts, length, WIDTH, generator=generator)
        mask = (torch.arange(length) < length - length // 3).expand(prompts, -1)
        if self.masks_states:
            states = states * mask[..., None]
        pooled = torch.randn(prompts, POOLED, generator=generator)
        return Condition(states, mask if self.has_mask else None, pooled if self.has_pooled else None)

    def run(self, pipeline: Any, condition: Condition, empty: Condition | None = None, **options: Any) -> Any:
        """Call the pipeline with a condition, guided if there is an empty one."""
        arguments = self._name(condition, "")
        if empty and self.has_negative:
            arguments |= self._name(empty, "negative_")
        defaults = {"height": self.image, "width": self.image, "output_type": "latent", **self.options}
        if not empty and self.has_negative:
            defaults[self.guidance] = self.unguided
        return pipeline(**{**defaults, **arguments, **options}).images

    def _name(self, condition: Condition, prefix: str) -> dict[str, Any]:
        """Return the arguments of the call that hold a condition."""
        states: Tensor | list[Tensor] = condition.states
        if self.takes_lists:
            assert condition.mask is not None
            states = [own[mask] for own, mask in zip(condition.states, condition.mask, strict=True)]
        arguments: dict[str, Any] = {f"{prefix}prompt_embeds": states}
        if self.mask:
            mask = condition.mask
            if mask is None:
                mask = torch.ones(condition.states.shape[:2], dtype=torch.bool)
            arguments[f"{prefix}{self.mask}"] = mask.to(self.mask_dtype)
        if self.has_pooled:
            arguments[f"{prefix}pooled_prompt_embeds"] = condition.pooled
        return arguments


def write_whole_pipeline(folder: Path, name: str, *, seed: int = 0, shard_size: str = "1GB") -> Path:
    """Write a pipeline of a family in `tests.families.TEXTS`, with a generator that reads its text encoders."""
    write_text_parts(folder, name, seed=seed, shard_size=shard_size)
    read = encode_prompts(load_encoders(folder), ["a"])
    for component in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / component)
    family = FAMILIES[name.partition("-")[0]]
    return family.write(
        folder,
        width=read.states.shape[-1],
        pooled=0 if read.pooled is None else read.pooled.shape[-1],
        shard_size=shard_size,
        seed=seed,
    )


def _randomize(module: nn.Module) -> Any:
    """Move every parameter off its initial value, and the statistics of batch norms."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter == 1))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return module.eval()


def kl(*, channels: int = 4, **changes: Any) -> AutoencoderKL:
    config = {"shift_factor": 0.3, "scaling_factor": 0.7, **changes}
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=IMAGE,
        **config,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE,
    )


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 0.8, 1.2, 2.0],
    )


def deep_compression() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )


def flow(**settings: Any) -> Callable[[], FlowMatchEulerDiscreteScheduler]:
    return lambda: FlowMatchEulerDiscreteScheduler(**settings)


def flux(*, distilled: bool) -> Callable[[int, int], FluxTransformer2DModel]:
    return lambda width, pooled: FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=width,
        pooled_projection_dim=pooled,
        guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4),
        **HEADS,
    )


def pixart(*, has_size: bool) -> Callable[[int, int], PixArtTransformer2DModel]:
    return lambda width, _: PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=4,
        cross_attention_dim=12,
        norm_num_groups=4,
        sample_size=8,
        caption_channels=width,
        use_additional_conditions=has_size,
    )


def flux2_klein(*, is_distilled: bool) -> TinyFamily:
    return TinyFamily(
        "Flux2KleinPipeline",
        lambda width, _: Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=width,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
            **HEADS,
        ),
        flow(shift=3.0, **DYNAMIC),
        flux2_vae,
        settings={"is_distilled": is_distilled},
    )


PIXART: dict[str, Any] = {
    "scheduler": DPMSolverMultistepScheduler,
    "vae": lambda: kl(shift_factor=None),
    "mask": "prompt_attention_mask",
    "options": {"use_resolution_binning": False, "negative_prompt": None, "clean_caption": False},
}
FAMILIES: dict[str, TinyFamily] = {
    "sd3": TinyFamily(
        "StableDiffusion3Pipeline",
        lambda width, pooled: SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=width,
            caption_projection_dim=16,
            pooled_projection_dim=pooled,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            **HEADS,
        ),
        flow(shift=3.0),
        kl,
        has_pooled=True,
    ),
    "flux": TinyFamily("FluxPipeline", flux(distilled=True), flow(**DYNAMIC), kl, has_pooled=True, has_negative=False),
    "flux-schnell": TinyFamily(
        "FluxPipeline", flux(distilled=False), flow(shift=1.0), kl, has_pooled=True, has_negative=False
    ),
    "chroma": TinyFamily(
        "ChromaPipeline",
        lambda width, _: ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=width,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
            **HEADS,
        ),
        flow(**DYNAMIC),
        kl,
        mask="prompt_attention_mask",
        mask_dtype=torch.float32,
    ),
    "pixart_sigma": TinyFamily("PixArtSigmaPipeline", pixart(has_size=False), **PIXART),
    "pixart_alpha": TinyFamily("PixArtAlphaPipeline", pixart(has_size=False), **PIXART),
    "auraflow": TinyFamily(
        "AuraFlowPipeline",
        lambda width, _: AuraFlowTransformer2DModel(
            sample_size=4,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=width,
            caption_projection_dim=16,
            pos_embed_max_size=64,
            **HEADS,
        ),
        flow(shift=1.73),
        lambda: kl(shift_factor=None),
        mask="prompt_attention_mask",
        masks_states=True,
    ),
    "z_image": TinyFamily(
        "ZImagePipeline",
        lambda width, _: ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=width,
            axes_dims=[2, 2, 4],
            axes_lens=[1024, 32, 32],
        ),
        flow(shift=3.0),
        kl,
        unguided=0.0,
        takes_lists=True,
    ),
    "flux2_klein": flux2_klein(is_distilled=False),
    "flux2_klein-distilled": flux2_klein(is_distilled=True),
    "qwen_image": TinyFamily(
        "QwenImagePipeline",
        lambda width, _: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            joint_attention_dim=width,
            axes_dims_rope=(2, 2, 4),
            **HEADS,
        ),
        flow(shift_terminal=0.02, **DYNAMIC),
        qwen_vae,
        guidance="true_cfg_scale",
        mask="prompt_embeds_mask",
    ),
    "lumina2": TinyFamily(
        "Lumina2Pipeline",
        lambda width, _: Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(2, 2, 4),
            axes_lens=(1024, 16, 16),
            cap_feat_dim=width,
        ),
        flow(shift=6.0),
        kl,
        mask="prompt_attention_mask",
        options={"height": 64, "width": 64},  # the pipeline takes every autoencoder for one of downscale 8
    ),
    "sana": TinyFamily(
        "SanaPipeline",
        lambda width, _: SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=width,
            sample_size=16,
            timestep_scale=0.5,
            **HEADS,
        ),
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        deep_compression,
        image=32,  # the pipeline takes multiples of 32 only
        mask="prompt_attention_mask",
        options={"use_resolution_binning": False, "complex_human_instruction": None, "negative_prompt": None},
    ),
}
