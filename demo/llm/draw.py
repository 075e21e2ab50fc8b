"""Draw with the pipeline: loaded for a CPU, and pictures with a seed each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from demo.art import SIZE
from demo.draw import draw_in_batches
from demo.llm.transformer import CAPTION_LENGTH

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
