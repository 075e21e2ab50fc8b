"""A technique for `eval-unlearn` (1.1 on PyPI), a benchmark of unlearning: it draws with a checkpoint of Emender.

`eval-unlearn` finds it by its entry point "emender":

    technique:
      name: emender
      config: {model: emender/emoji, revision: production, endpoint: "http://localhost:8000", erase_concept: nudity}

The technique itself downloads nothing. The metrics of `eval-unlearn` download models or data sets: they need the
Hugging Face Hub or a filled cache.
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
"""Environment variable with the API key for `endpoint`. A configuration would end up in the benchmark's reports."""

_PATTERNS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]


class EmenderTechnique:
    """A pipeline with its own sampler, as with every other technique of `eval-unlearn`.

    `model` is a pipeline's folder, or `namespace/name` at the `endpoint` of an Emender service, where `revision` is a
    version, an alias or a commit. Only `eval-unlearn` uses `erase_concept`, for its reports and for metrics of one
    concept. Weights come from safetensors only; there is no safety checker.

    Raises `EditingError` if the folder or the service has no such pipeline, and TypeError for an unknown setting.
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
            raise EditingError("a revision needs an endpoint: give it too", pointer="/revision")
        folder = _download(model, endpoint=endpoint, revision=revision) if endpoint else Path(model)
        no_checker: dict[str, None] = {} if detect_family(folder) == "sdxl" else {"safety_checker": None}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.erase_concept = erase_concept
        self._pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **no_checker
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}

    def generate(self, prompts: Sequence[str], seed: int | None = None, **settings: Any) -> list[Image.Image]:
        """Draw each prompt, the first with `seed`, the next with `seed + 1` and so on.

        Without a seed the noise is random. A seed gives the same noise on any device. `settings` go to the pipeline.
        """
        pictures = []
        for number, prompt in enumerate(prompts):
            generator = None if seed is None else torch.Generator().manual_seed(seed + number)
            drawn = self._pipeline(prompt, generator=generator, **(self._settings | settings))
            pictures.append(drawn.images[0])
        return pictures


def _download(model: str, *, endpoint: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                endpoint=endpoint,
                token=os.environ.get(API_KEY) or False,
                allow_patterns=_PATTERNS,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedPipeline(f"{model} cannot be downloaded from {endpoint}: {error}") from error
