"""Pipelines of every family, from the prompt to the picture, against diffusers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Generator

from editing.pipelines import EditablePipeline, load_pipeline
from tests.families import TEXTS
from tests.generators import FAMILIES, TinyFamily, write_whole_pipeline

PROMPTS = ["a cat", "a small boat by the river"]


SLOW = {"sana"}  # its instruction has thousands of tokens here


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TEXTS],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_pipeline(tmp_path_factory.mktemp("whole") / request.param, request.param)


@pytest.fixture(scope="module")
def family(folder: Path) -> TinyFamily:
    return FAMILIES[folder.name.partition("-")[0]]


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> EditablePipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def diffusers(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_drawn_pictures_equal_those_of_diffusers(
    family: TinyFamily, pipeline: EditablePipeline, diffusers: Any
) -> None:
    """Prompts, seeds, steps and guidance are all that both get."""
    options = {
        name: value for name, value in family.options.items() if name in ("height", "width", "use_resolution_binning")
    }
    options = {"height": family.image, "width": family.image, **options}
    if family.guidance == "true_cfg_scale":
        options["negative_prompt"] = ["", ""]  # without one, this pipeline is not guided
    expected = diffusers(
        prompt=list(PROMPTS),
        num_inference_steps=2,
        generator=[Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="pt",
        **{family.guidance: 3.0},
        **options,
    ).images
    latents = pipeline.sample(
        PROMPTS,
        generators=[Generator().manual_seed(seed) for seed in (1, 2)],
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    pixels = (pipeline.generator.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert float(pixels.std()) > 0.05
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-3)
