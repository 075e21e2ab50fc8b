"""Load a diffusers pipeline for editing: only safetensors, only local files, no code from the folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from editing.condition import Condition
from editing.encoders.base import TextEncoder
from editing.encoders.load import load_encoders
from editing.families.conditions import encode_prompts
from editing.families.layout import read_json
from editing.families.registry import FAMILIES
from editing.generators.generator import Generator
from editing.generators.load import load_generator
from editing.prompts import PromptTokenizer


@dataclass
class EditablePipeline:
    """A text-to-image pipeline with editable text encoders. Its modules are in eval mode and take no gradients."""

    encoders: tuple[TextEncoder, ...]
    """One in SD 1.x, two in SDXL, three in SD3, in the order in which the pipeline has them."""
    generator: Generator
    folder: Path | None = None
    empty_is_zero: bool = False
    """Whether classifier-free guidance uses zeros for the empty prompt instead of its encoding."""

    @property
    def encoder(self) -> TextEncoder:
        """The first text encoder."""
        return self.encoders[0]

    @property
    def family(self) -> str:
        """The name of the pipeline's family."""
        return self.encoder.family

    @property
    def tokenizer(self) -> PromptTokenizer:
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts with every encoder as the pipeline's `encode_prompt` does."""
        return encode_prompts(self.encoders, prompts)

    def encode_empty(self) -> Condition:
        """Return the unconditional input of classifier-free guidance, for one prompt."""
        empty = encode_prompts(self.encoders, [""], negative=True)
        return empty.map(torch.zeros_like) if self.empty_is_zero else empty

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        generators: Sequence[torch.Generator],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Draw latents (p, c, h, w) for prompts, each from its own generator of random numbers.

        Settings default to those of the family. The generators are on the CPU, so that a seed gives the same noise on
        any device.
        """
        family = FAMILIES[self.family]
        num_inference_steps = family.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = family.guidance_scale if guidance_scale is None else guidance_scale
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
    """Load a pipeline of a family in `editing.families.registry`.

    On a GPU the generator's weights are bfloat16 where `dtype` is float32 and `generator_dtype` names no other.
    `compile_generator` compiles it at its first use, which takes minutes and pays off in a long-running worker.

    Raises `UnsafePipeline` if there are only pickles and `UnsupportedPipeline` for any other family.
    """
    folder, device = Path(folder), torch.device(device)
    if generator_dtype is None:
        generator_dtype = torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else dtype
    encoders = load_encoders(folder, device=device, dtype=dtype)
    index = read_json(folder / "model_index.json")
    return EditablePipeline(
        encoders=encoders,
        generator=load_generator(
            folder, device=device, dtype=generator_dtype, autoencoder_dtype=dtype, compiled=compile_generator
        ),
        folder=folder,
        empty_is_zero=encoders[0].family == "sdxl" and index.get("force_zeros_for_empty_prompt", True),
    )
