from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import editing
from demo.sd3.draw import draw_pictures, load_pipeline
from demo.sd3.pipeline import CLIP_LENGTH, PIPELINE_LENGTH, T5_LENGTH, Networks

pytestmark = pytest.mark.slow

PROMPTS = ["a photo of a fox", "a big red fox!"]


def encode(
    networks: Networks, pipeline: StableDiffusion3Pipeline, *, length: int, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    clip = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt")
    t5 = pipeline.tokenizer_3(PROMPTS, padding="max_length", max_length=length, return_tensors="pt")
    return networks.float().encode(clip.input_ids, t5.input_ids, kept)


@torch.no_grad()
def test_training_encodes_captions_as_the_pipeline_does(networks: Networks, pipeline_folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    for length in (T5_LENGTH, PIPELINE_LENGTH):
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        states, pooled = encode(networks, pipeline, length=length)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_encoder_that_is_left_out_gives_zeros(networks: Networks, pipeline_folder: Path) -> None:
    pipeline = load_pipeline(pipeline_folder)
    whole, whole_pooled = encode(networks, pipeline, length=T5_LENGTH)
    states, pooled = encode(networks, pipeline, length=T5_LENGTH, kept=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    assert torch.equal(states[0, :CLIP_LENGTH, :32], whole[0, :CLIP_LENGTH, :32])
    assert not states[0, :CLIP_LENGTH, 32:].any()
    assert torch.equal(states[0, CLIP_LENGTH:], whole[0, CLIP_LENGTH:])
    assert not states[1, CLIP_LENGTH:].any()
    assert torch.equal(pooled[1], torch.cat([torch.zeros(32), whole_pooled[1, 32:]]))


@torch.no_grad()
def test_the_engine_loads_the_folder_and_conditions_equally(networks: Networks, pipeline_folder: Path) -> None:
    pipeline = editing.load_pipeline(pipeline_folder)
    condition = pipeline.encode(PROMPTS)
    states, pooled = encode(networks, load_pipeline(pipeline_folder), length=PIPELINE_LENGTH)
    torch.testing.assert_close(condition.states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(condition.pooled, pooled, atol=1e-5, rtol=0)


def test_the_networks_predict_what_the_engine_does(networks: Networks, pipeline_folder: Path) -> None:
    engine, noisy = editing.load_pipeline(pipeline_folder), torch.randn(2, 4, 8, 8)
    sigmas = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        condition = engine.encode(PROMPTS)
        assert condition.pooled is not None
        expected = engine.generator.predict(noisy, 1000 * sigmas, condition)
        predicted = networks.float().predict(noisy, sigmas, (condition.states, condition.pooled))
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=0)


def test_pictures_have_the_size_of_the_art_and_depend_on_their_seed_alone(pipeline_folder: Path) -> None:
    pipeline = load_pipeline(pipeline_folder)
    both = draw_pictures(pipeline, PROMPTS, [1, 2], steps=2)
    alone = draw_pictures(pipeline, PROMPTS[1:], [2], steps=2)
    assert both.shape == (2, 3, 32, 32)
    torch.testing.assert_close(both[1], alone[0], atol=1e-4, rtol=0)
