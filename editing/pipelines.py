"""Load a diffusers pipeline for editing: only safetensors, only local files, no code from the folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from editing.chunks import ChunkSize
from editing.condition import Condition
from editing.encoders.clip import EditableEncoder, join_encodings
from editing.errors import UnsupportedPipeline
from editing.families.layout import TOKENIZERS, detect_family, read_json
from editing.prompts import PromptTokenizer

PREDICTIONS = ("epsilon", "v_prediction")

_SAVED_MAPS = 1300
"""Memory that SD 1.x's U-Net keeps for the gradients of one latent, in feature maps of its first block (measured)."""


@dataclass
class EditablePipeline:
    """A text-to-image pipeline with editable text encoders. Its modules are in eval mode and take no gradients."""

    encoders: tuple[EditableEncoder, ...]
    """One in SD 1.x and 2.x, two in SDXL, in the order in which the U-Net reads them."""
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DPMSolverMultistepScheduler
    """A fast deterministic solver with the pipeline's noise schedule. It replaces the pipeline's own solver."""
    folder: Path | None = None
    empty_is_zero: bool = False
    """Whether classifier-free guidance uses zeros for the empty prompt instead of its encoding."""
    mixed_precision: bool = False
    """Whether the U-Net computes in bfloat16 where that is safe, for weights of any dtype."""

    @property
    def encoder(self) -> EditableEncoder:
        """The first text encoder. Only SDXL has another."""
        return self.encoders[0]

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

    @property
    def predicts_velocity(self) -> bool:
        """Whether the U-Net predicts v = √ᾱ_t ε - √(1-ᾱ_t) x_0 rather than ε."""
        return bool(self.scheduler.config.prediction_type == "v_prediction")

    @cached_property
    def unet_chunks(self) -> ChunkSize:
        """The number of latents that go through the U-Net at a time, with gradients."""
        return ChunkSize(_choose_chunk_size(self.unet, self.latent_shape, self.device))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts with every encoder as inference does: at the full length and without a mask."""
        return join_encodings(
            [encoder.encode([encoder.tokenizer.encode(prompt).ids for prompt in prompts]) for encoder in self.encoders]
        )

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the U-Net's prediction, ε or v, (b, c, h, w) float32.

        Takes x_t (b, c, h, w), timesteps (b,) and a condition of b prompts. SDXL also gets the picture's size: that of
        its training pictures, not cropped.
        """
        dtype = self.unet.dtype
        added = None
        if condition.pooled is not None:
            height, width = self.image_size
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=noisy.device)
            added = {"text_embeds": condition.pooled.to(dtype), "time_ids": sizes.expand(len(noisy), -1)}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision):
            prediction: Tensor = self.unet(
                noisy.to(dtype),
                timesteps,
                encoder_hidden_states=condition.states.to(dtype),
                added_cond_kwargs=added,
            ).sample
        return prediction.float()

    @property
    def _empty_condition(self) -> Condition:
        """The unconditional input of classifier-free guidance, for one prompt."""
        empty = self.encode([""])
        return empty.map(torch.zeros_like) if self.empty_is_zero else empty

    @torch.no_grad()
    def predict_in_chunks(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Call `predict` without gradients on as many latents at a time as fit into memory."""

        def predict(chunk: slice) -> Tensor:
            return self.predict(noisy[chunk], timesteps[chunk], condition[chunk])

        return torch.cat(self.unet_chunks.run_in_chunks(len(noisy), predict))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Draw latents (p, c, h, w) for prompts, each from its own generator.

        Generators are on the CPU, so that a seed gives the same noise on any device.
        """
        shape = self.latent_shape
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        condition = self.encode(prompts)
        if guidance_scale != 1.0:
            empty = self._empty_condition.map(lambda tensor: tensor.expand(len(prompts), *tensor.shape[1:]))
            condition = Condition.concatenate([empty, condition])
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)  # has state: one per run
        scheduler.set_timesteps(num_inference_steps)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            batch = torch.cat([latents, latents]) if guidance_scale != 1.0 else latents
            batch = scheduler.scale_model_input(batch, t)
            prediction = self.predict_in_chunks(batch, t.expand(len(batch)).to(self.device), condition)
            if guidance_scale != 1.0:
                unguided, guided = prediction.chunk(2)  # (p, c, h, w) each
                prediction = unguided + guidance_scale * (guided - unguided)
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
    """Load a pipeline of the SD 1.x, SD 2.x or SDXL family.

    On a GPU the U-Net computes in bfloat16 unless `mixed_precision` is False, and in the channels-last layout.
    `compile_unet` compiles it at its first use, which takes minutes and pays off in a long-running worker.

    Raises `UnsafePipeline` if there are only pickles and `UnsupportedPipeline` for any other family.
    """
    folder = Path(folder)
    family = detect_family(folder)
    scheduler = DPMSolverMultistepScheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    if scheduler.config.prediction_type not in PREDICTIONS:
        predicted = scheduler.config.prediction_type
        raise UnsupportedPipeline(f"the U-Net predicts {predicted}: only {' or '.join(PREDICTIONS)} can be edited")
    options = {"local_files_only": True, "use_safetensors": True}

    def prepare(model: torch.nn.Module) -> torch.nn.Module:
        return model.requires_grad_(False).eval().to(device)

    def load_encoder(name: str) -> EditableEncoder:
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        model = prepare(kind.from_pretrained(folder / name, dtype=dtype, **options))
        tokenizer = PromptTokenizer.from_folder(folder / TOKENIZERS[name])
        return EditableEncoder(model, tokenizer, name=name, folder=folder / name, family=family)

    names = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, **options)
    if (unet.config.addition_embed_type == "text_time") != (family == "sdxl"):
        raise UnsupportedPipeline(f"unet/ is not the U-Net of a pipeline of family {family}")
    unet = prepare(unet)
    cuda = torch.device(device).type == "cuda"
    if cuda:
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    if compile_unet:
        unet.compile()
    vae = read_json(folder / "vae" / "config.json")
    upcast = dtype == torch.float16 and vae.get("force_upcast")  # SDXL's VAE overflows in float16
    return EditablePipeline(
        encoders=tuple(map(load_encoder, names)),
        unet=unet,
        vae=prepare(
            AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32 if upcast else dtype, **options)
        ),
        scheduler=scheduler,
        folder=folder,
        empty_is_zero=family == "sdxl"
        and read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True),
        mixed_precision=cuda if mixed_precision is None else mixed_precision,
    )


def _choose_chunk_size(unet: UNet2DConditionModel, latent_shape: tuple[int, int, int], device: torch.device) -> int:
    """Return a number of latents that suits the CPU's caches, or that fills half of the GPU's free memory."""
    if device.type != "cuda":
        return 32
    _, height, width = latent_shape
    free, _ = torch.cuda.mem_get_info(device)
    bytes_per_latent = _SAVED_MAPS * unet.config.block_out_channels[0] * height * width * 2  # bfloat16
    return int(max(1, min(256, free // 2 // bytes_per_latent)))
