import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from demo.classify import classify, load_classifier
from demo.sd3.draw import FOLDER, GUIDANCE, load_pipeline

NAMES = ["moon", "banana", "castle", "penguin", "guitar", "key"]


@pytest.mark.slow
def test_the_committed_pipeline_draws_what_it_is_asked_for() -> None:
    classifier = load_classifier()
    pipeline = load_pipeline()
    for length in (32, 256):
        pictures = pipeline(
            [f"a photo of a {name}" for name in NAMES],
            height=32, width=32, num_inference_steps=10, guidance_scale=GUIDANCE, max_sequence_length=length,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(NAMES))], output_type="pt",
        ).images  # fmt: skip
        shown = classify(2 * pictures - 1, classifier).concept.argmax(1).tolist()
        assert [classifier.names[index] for index in shown] == NAMES


@pytest.mark.slow
def test_diffusers_loads_the_committed_pipeline_without_options() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER)
    pictures = pipeline("a moon", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 32, 32, 3)
