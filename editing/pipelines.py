"""Load a diffusers pipeline for editing: only safetensors, only local files, no code from the folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from editing.condition import Condition
from editing.encoders.clip import EditableEncoder, join_encodings
from editing.families.layout import TOKENIZERS, detect_family, read_json
from editing.generators.generator import Generator
from editing.generators.load import load_generator
from editing.prompts import PromptTokenizer


@dataclass
class EditablePipeline:
    """A text-to-image pipeline with editable text encoders. Its modules are in eval mode and take no gradients."""

    encoders: tuple[EditableEncoder, ...]
    """One in SD 1.x and 2.x, two in SDXL, in the order in which the generator reads them."""
    generator: Generator
    folder: Path | None = None
    empty_is_zero: bool = False
    """Whether classifier-free guidance uses zeros for the empty prompt instead of its encoding."""

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

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts with every encoder as inference does: at the full length and without a mask."""
        return join_encodings(
            [encoder.encode([encoder.tokenizer.encode(prompt).ids for prompt in prompts]) for encoder in self.encoders]
        )

    def encode_empty(self) -> Condition:
        """Return the unconditional input of classifier-free guidance, for one prompt."""
        empty = self.encode([""])
        return empty.map(torch.zeros_like) if self.empty_is_zero else empty

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Draw latents (p, c, h, w) for prompts, each from its own generator of random numbers.

        These are on the CPU, so that a seed gives the same noise on any device.
        """
        return self.generator.sample(
            self.encode(prompts),
            self.encode_empty() if self.generator.is_guided(guidance_scale) else None,
            generators=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )


def load_pipeline(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    generator_dtype: torch.dtype | None = None,
    compile_generator: bool = False,
) -> EditablePipeline:
    """Load a pipeline of the SD 1.x, SD 2.x or SDXL family.

    On a GPU the generator's weights are bfloat16 where `dtype` is float32 and `generator_dtype` names no other.
    `compile_generator` compiles it at its first use, which takes minutes and pays off in a long-running worker.

    Raises `UnsafePipeline` if there are only pickles and `UnsupportedPipeline` for any other family.
    """
    folder, device = Path(folder), torch.device(device)
    family = detect_family(folder)
    if generator_dtype is None:
        generator_dtype = torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else dtype

    def load_encoder(name: str) -> EditableEncoder:
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        model = kind.from_pretrained(folder / name, dtype=dtype, local_files_only=True, use_safetensors=True)
        model = model.requires_grad_(False).eval().to(device)
        tokenizer = PromptTokenizer.from_folder(folder / TOKENIZERS[name])
        return EditableEncoder(model, tokenizer, name=name, folder=folder / name, family=family)

    names = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    return EditablePipeline(
        encoders=tuple(map(load_encoder, names)),
        generator=load_generator(
            folder, device=device, dtype=generator_dtype, autoencoder_dtype=dtype, compiled=compile_generator
        ),
        folder=folder,
        empty_is_zero=family == "sdxl"
        and read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True),
    )
