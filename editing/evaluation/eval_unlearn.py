"""A technique for `eval-unlearn` (1.1 on PyPI): its benchmark of unlearning draws with a checkpoint of Emender.

`eval-unlearn` finds it by its entry point as "emender":

    technique:
      name: emender
      config: {model: emender/emoji, revision: production, endpoint: "http://localhost:8000", erase_concept: nudity}

The technique itself needs nothing from a hub. The metrics that come with `eval-unlearn` do: each fetches models or data
sets, so that they run where the Hugging Face Hub can be reached, or its cache is filled.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from editing.errors import EditingError, UnsupportedPipeline
from editing.families.layout import detect_family

API_KEY = "EMENDER_API_KEY"
"""The environment's variable with the key for `endpoint`: a configuration ends up in the benchmark's reports."""

_SERVED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]


class EmenderTechnique:
    """A pipeline with its own sampler, as `eval-unlearn` draws with every other technique.

    `model` is a pipeline's folder, or `namespace/name` at the `endpoint` of an Emender service, where `revision` is a
    version, an alias or a commit. `erase_concept` is read by `eval-unlearn` alone, for its reports and for the metrics
    that are of one concept. Weights are read from safetensors only; there is no safety checker.

    Raises `EditingError` for a folder or a service that has no such pipeline, and TypeError for an unknown setting.
    """

    def __init__(
        self,
        *,
        model: str,
        endpoint: str | None = None,
        revision: str | None = None,
        erase_concept: str | None = None,
        device: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
    ) -> None:
        if revision and not endpoint:
            raise EditingError("a revision is a service's: give its endpoint too", pointer="/revision")
        folder = _pulled(model, endpoint=endpoint, revision=revision) if endpoint else Path(model)
        unchecked = {} if detect_family(folder) == "sdxl" else {"safety_checker": None}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.erase_concept = erase_concept
        self._pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **unchecked
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}

    def generate(self, prompts: Sequence[str], seed: int | None = None, **settings: Any) -> list[Image.Image]:
        """A picture of each prompt, the first from `seed` and each from the one after its neighbour's; without a seed
        from chance. The same seed gives the same picture on any device. `settings` go to the pipeline."""
        pictures = []
        for number, prompt in enumerate(prompts):
            generator = None if seed is None else torch.Generator().manual_seed(seed + number)
            drawn = self._pipeline(prompt, generator=generator, **(self._settings | settings))
            pictures.append(drawn.images[0])
        return pictures


def _pulled(model: str, *, endpoint: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                endpoint=endpoint,
                token=os.environ.get(API_KEY) or False,
                allow_patterns=_SERVED,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedPipeline(f"{model} cannot be had from {endpoint}: {error}") from error
