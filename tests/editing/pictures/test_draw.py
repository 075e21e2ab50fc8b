"""Drawn pictures equal those of diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from editing.errors import InvalidEdit, InvalidPrompt
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline

PROMPTS = ("a cat", "the old tree")


class TestDraw:
    @pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
    def test_pictures_equal_those_of_diffusers(
        self, folder: Path, pipeline: EditablePipeline, guidance_scale: float
    ) -> None:
        reference = StableDiffusionPipeline.from_pretrained(folder)
        reference.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.generator.scheduler.config)
        reference.set_progress_bar_config(disable=True)
        latents = torch.stack(
            [
                torch.randn(pipeline.generator.latent_shape, generator=torch.Generator().manual_seed(seed))
                for seed in (5, 6)
            ]
        )
        expected = reference(
            list(PROMPTS), latents=latents, num_inference_steps=4, guidance_scale=guidance_scale, output_type="np"
        ).images
        drawn = draw_pictures(pipeline, PROMPTS, seeds=(5, 6), num_inference_steps=4, guidance_scale=guidance_scale)
        assert (
            np.abs(np.stack([np.asarray(picture) / 255 for picture in drawn]) - expected).max() < 3e-3
        )  # half a level

    def test_picture_of_a_seed_does_not_depend_on_the_batch(self, pipeline: EditablePipeline) -> None:
        together = draw_pictures(pipeline, PROMPTS, seeds=(5, 6), num_inference_steps=2)
        alone = draw_pictures(pipeline, PROMPTS[1:], seeds=(6,), num_inference_steps=2)
        difference = np.asarray(together[1]).astype(int) - np.asarray(alone[0])
        assert np.abs(difference).max() <= 1

    def test_invalid_prompt_is_named(self, pipeline: EditablePipeline) -> None:
        with pytest.raises(InvalidPrompt) as refusal:
            draw_pictures(pipeline, ("a cat", "a\0cat"), seeds=(0, 1), num_inference_steps=1)
        assert refusal.value.pointer == "/prompts/1"
        with pytest.raises(InvalidEdit, match="each needs its own"):
            draw_pictures(pipeline, ("a cat",), seeds=(0, 1), num_inference_steps=1)
