"""Draw pictures with a seed each, with the pipeline or, in large batches, without it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from demo.art import SIZE
from demo.draw import draw_in_batches
from demo.llm.encoder import encode_captions
from demo.llm.transformer import CAPTION_LENGTH, LATENT_SIDE, Captions, draw_latents

STEPS = 20
GUIDANCE = 2.0  # as Z-Image counts it: 0 is without


def load_pipeline(folder: Path) -> ZImagePipeline:
    """Return the pipeline in float32. Raises FileNotFoundError when the folder holds none."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline; run `python -m demo.llm.build {folder}`")
    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_pictures(
    pipeline: ZImagePipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    batch: int = 32,
    shown_as: str | None = None,
) -> Tensor:
    """Return (prompts, 3, 32, 32) in [-1, 1]: one picture for each prompt, its noise drawn from its seed alone.

    `shown_as` names the progress bar; without it there is none.
    """
    empty, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=CAPTION_LENGTH)

    def draw(chosen: list[str], **options: Any) -> Any:
        # The pipeline pads to 512 tokens, which changes nothing and costs most of the time.
        encoded, _ = pipeline.encode_prompt(
            chosen, do_classifier_free_guidance=False, max_sequence_length=CAPTION_LENGTH
        )
        return pipeline(
            prompt_embeds=encoded,
            negative_prompt_embeds=empty * len(encoded),
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            **options,
        )

    return draw_in_batches(draw, prompts, seeds, batch=batch, shown_as=shown_as)


def draw_pictures_directly(
    pipeline: ZImagePipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    batch: int = 1024,
) -> Tensor:
    """Return what `draw_pictures` returns, much faster on a GPU: the pipeline takes each picture of a batch alone.

    Raises ValueError for a prompt of more than 32 tokens.
    """
    captions = encode_captions(pipeline.tokenizer, pipeline.text_encoder, [*prompts, ""], batch=batch)
    if (longest := int(captions.lengths.max())) > CAPTION_LENGTH:
        raise ValueError(f"a prompt has {longest} tokens; at most {CAPTION_LENGTH} can be drawn directly")
    shape = (1, 4, LATENT_SIDE, LATENT_SIDE)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return draw_captions(
        pipeline.transformer,
        pipeline.vae,
        captions[:-1],
        captions[-1:],
        noise.to(captions.states.device),
        steps=steps,
        guidance_scale=guidance_scale,
        batch=batch,
    )


@torch.no_grad()
def draw_captions(
    transformer: ZImageTransformer2DModel,
    autoencoder: AutoencoderKL,
    captions: Captions,
    empty: Captions,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    batch: int = 1024,
) -> Tensor:
    """Return (captions, 3, 32, 32) in [-1, 1] from noise (captions, 4, 8, 8)."""
    parts = []
    for start in range(0, len(noise), batch):
        rows = slice(start, start + batch)
        latents = draw_latents(
            transformer, captions[rows], empty, noise[rows], steps=steps, guidance_scale=guidance_scale
        )
        parts.append(autoencoder.decode(latents / autoencoder.config["scaling_factor"]).sample.clamp(-1, 1))
    return torch.cat(parts)
