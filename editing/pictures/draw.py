"""Draw pictures with a pipeline. The same seed before and after an edit shows the edit."""

from collections.abc import Sequence

import torch
from PIL import Image

from editing.errors import InvalidEdit
from editing.pipelines import EditablePipeline

_BATCH = 32


@torch.no_grad()
def draw_pictures(
    pipeline: EditablePipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> list[Image.Image]:
    """Draw one picture for each prompt from its own seed. The noise of a seed does not depend on the batch.

    Settings of sampling default to those of the pipeline's family.
    """
    if len(prompts) != len(seeds):
        raise InvalidEdit(f"{len(prompts)} prompts with {len(seeds)} seeds: each needs its own", pointer="/seeds")
    for encoder in pipeline.encoders:
        for index, prompt in enumerate(prompts):
            encoder.tokenizer.encode(prompt, pointer=f"/prompts/{index}")
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH):
        chunk = slice(start, start + _BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
        latents = pipeline.sample(
            prompts[chunk],
            generators=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        pixels = pipeline.generator.decode(latents)  # (b, 3, h, w)
        levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()  # (b, h, w, 3)
        pictures += [Image.fromarray(picture.contiguous().numpy()) for picture in levels]
    return pictures
