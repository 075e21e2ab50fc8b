"""Draw with the emoji model: its pipeline, loaded for a CPU, and pictures with a seed each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from demo.concepts import WEIGHTS

STEPS = 20
GUIDANCE = 3.0


def load_pipeline(path: Path = WEIGHTS / "pipeline") -> StableDiffusionPipeline:
    """Load the pipeline in float32, without its progress bar. Raises FileNotFoundError when the folder holds none."""
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} holds no pipeline; restore it from git or run `python -m demo.train export`")
    pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_pictures(
    pipeline: StableDiffusionPipeline,
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

    def draw(chosen: list[str], **options: Any) -> Any:
        return pipeline(chosen, num_inference_steps=steps, guidance_scale=guidance_scale, **options)

    return draw_in_batches(draw, prompts, seeds, batch=batch, shown_as=shown_as)


def draw_in_batches(
    draw: Callable[..., Any], prompts: Sequence[str], seeds: Sequence[int], *, batch: int, shown_as: str | None
) -> Tensor:
    """Return what a pipeline draws of prompts, (prompts, 3, height, width) in [-1, 1].

    `draw` calls the pipeline with a list of prompts; their generators and the type of the pictures are its options.
    """
    parts = []
    starts = range(0, len(prompts), batch)
    for start in tqdm(starts, desc=shown_as, unit="batch", disable=shown_as is None):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        pictures = draw(list(prompts[start : start + batch]), generator=generators, output_type="pt").images
        parts.append(torch.as_tensor(pictures) * 2 - 1)
    return torch.cat(parts)
