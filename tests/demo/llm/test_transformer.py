import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from demo.llm.transformer import Captions, draw_latents, predict_velocity
from tests.demo.llm.conftest import WIDTH


def encoded(*lengths: int) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return [torch.randn(length, WIDTH, generator=chance) for length in lengths]


@torch.no_grad()
def test_velocity_equals_the_modules_own_forward_pass(transformer: ZImageTransformer2DModel) -> None:
    captions, latents, sigmas = encoded(9, 32, 20), torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 1.0])
    expected = transformer([x[:, None] for x in latents], 1 - sigmas, captions, return_dict=False)[0]
    found = predict_velocity(transformer, latents, sigmas, Captions.of(captions))
    assert torch.allclose(found, torch.stack(expected).squeeze(2), atol=1e-5)


@torch.no_grad()
def test_latents_are_drawn_as_the_pipeline_draws_them(transformer: ZImageTransformer2DModel) -> None:
    captions, (empty,), noise = encoded(9, 12), encoded(7), torch.randn(2, 4, 16, 16)[..., :8, :8].contiguous()
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=captions,
        negative_prompt_embeds=[empty, empty],
        height=64,  # without an autoencoder the pipeline counts eight pixels to a latent
        width=64,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="latent",
    ).images
    found = draw_latents(transformer, Captions.of(captions), Captions.of([empty]), noise, steps=3, guidance_scale=2.0)
    assert torch.allclose(found, expected, atol=1e-4)


def test_captions_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens; at most 32"):
        Captions.of(encoded(33))
