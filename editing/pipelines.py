"""Load a diffusers pipeline for editing: safetensors only, local files only, no code from the folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from editing.encoders import EditableEncoder
from editing.errors import UnsupportedPipeline
from editing.layout import pipeline_family, read_json
from editing.memory import PartSize
from editing.prompts import PromptTokenizer

_SAVED_MAPS = 1300
"""What SD 1.x's U-Net keeps for the gradients of one latent, in feature maps of its first block (counted)."""


@dataclass
class EditablePipeline:
    """A text-to-image pipeline whose text encoder can be edited. Everything is in eval mode and takes no gradient."""

    encoder: EditableEncoder
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DPMSolverMultistepScheduler
    """A fast deterministic solver with the pipeline's own noise schedule, whatever solver the pipeline names."""
    folder: Path | None = None
    mixed_precision: bool = False
    """Whether the U-Net computes in bfloat16 where that is safe, whatever its weights are."""

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = self.latent_shape
        return height * scale, width * scale

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t of the noise schedule, (timesteps,) float32."""
        return self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    @cached_property
    def unet_parts(self) -> PartSize:
        """How many latents go through the U-Net at a time, gradients included."""
        return PartSize(_latents_that_fit(self.unet, self.latent_shape, self.device))

    def predict(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """ε(x_t, c, t) in float32: noisy (b, c, h, w), timesteps (b,), states (b, s, d)."""
        dtype = self.unet.dtype
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision):
            prediction: Tensor = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=states.to(dtype)).sample
        return prediction.float()

    @torch.no_grad()
    def predict_all(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """`predict` without gradients, of as many latents at a time as memory has room for."""
        parts = self.unet_parts.split(len(noisy), lambda part: self.predict(noisy[part], timesteps[part], states[part]))
        return torch.cat(parts)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[tuple[int, ...]], *, generators: Sequence[torch.Generator], steps: int, guidance: float
    ) -> Tensor:
        """Latents (p, c, h, w) drawn for token ids, each from its own generator (on the CPU, so that a seed means
        the same picture on any device)."""
        shape = self.latent_shape
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        states = self.encoder.encode(prompts)  # (p, s, d)
        if guidance != 1.0:
            states = torch.cat([self.encoder.encode([self.tokenizer.empty.ids]).expand_as(states), states])
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)  # it keeps state: one per run
        scheduler.set_timesteps(steps)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            batch = torch.cat([latents, latents]) if guidance != 1.0 else latents
            prediction = self.predict_all(batch, t.expand(len(batch)).to(self.device), states)
            if guidance != 1.0:
                unguided, guided = prediction.chunk(2)
                prediction = unguided + guidance * (guided - unguided)
            latents = scheduler.step(prediction, t, latents).prev_sample
        return latents


def load_pipeline(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mixed_precision: bool | None = None,
    compile_unet: bool = False,
) -> EditablePipeline:
    """Load a pipeline of the SD 1.x family.

    On a GPU the U-Net computes in bfloat16 unless `mixed_precision` is False, and with its channels last.
    `compile_unet` has torch compile it at its first use, which takes minutes and pays in a worker that goes on.

    Raises `UnsafePipeline` where there are only pickles and `UnsupportedPipeline` for any other family.
    """
    folder = Path(folder)
    family = pipeline_family(folder)
    if family != "sd1":
        raise UnsupportedPipeline(f"a pipeline of the family {family} cannot be edited yet: this version edits sd1")
    options = {"local_files_only": True, "use_safetensors": True}

    def prepared(model: torch.nn.Module) -> torch.nn.Module:
        return model.requires_grad_(False).eval().to(device)

    text_model = prepared(CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, **options))
    tokenizer = PromptTokenizer.from_folder(folder / "tokenizer")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        raise UnsupportedPipeline(f"a U-Net that predicts {scheduler['prediction_type']} cannot be edited yet")
    unet = prepared(UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, **options))
    cuda = torch.device(device).type == "cuda"
    if cuda:
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch forgets it
    if compile_unet:
        unet.compile()
    return EditablePipeline(
        encoder=EditableEncoder(text_model, tokenizer, folder=folder / "text_encoder"),
        unet=unet,
        vae=prepared(AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, **options)),
        scheduler=DPMSolverMultistepScheduler.from_config(scheduler),
        folder=folder,
        mixed_precision=cuda if mixed_precision is None else mixed_precision,
    )


def _latents_that_fit(unet: UNet2DConditionModel, latent_shape: tuple[int, int, int], device: torch.device) -> int:
    """On the CPU a number that suits its caches; on a GPU what half of the free memory holds."""
    if device.type != "cuda":
        return 32
    _, height, width = latent_shape
    free, _ = torch.cuda.mem_get_info(device)
    of_one = _SAVED_MAPS * unet.config.block_out_channels[0] * height * width * 2  # bytes, bfloat16
    return int(max(1, min(256, free // 2 // of_one)))
