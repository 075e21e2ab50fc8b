"""Draw with the pipeline: loaded in float32, and pictures with a seed each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from demo.concepts import WEIGHTS
from demo.draw import draw_in_batches
from demo.sd3.pipeline import T5_LENGTH

FOLDER = WEIGHTS / "sd3"
STEPS = 10
GUIDANCE = 3.0


def load_pipeline(folder: Path = FOLDER, *, device: str = "cpu") -> StableDiffusion3Pipeline:
    """Return the pipeline in float32. Raises FileNotFoundError when the folder holds none."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline; restore it from git or run `python -m demo.sd3.train`")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw_pictures(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    length: int = T5_LENGTH,
    batch: int = 32,
    shown_as: str | None = None,
) -> Tensor:
    """Return (prompts, 3, 32, 32) in [-1, 1]: one picture for each prompt, its noise drawn from its seed alone.

    T5 reads `length` tokens, padding included. `shown_as` names the progress bar; without it there is none.
    """

    def draw(chosen: list[str], **options: Any) -> Any:
        return pipeline(
            chosen,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=length,
            **options,
        )

    return draw_in_batches(draw, prompts, seeds, batch=batch, shown_as=shown_as).cpu()
