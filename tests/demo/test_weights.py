"""The committed weights: they load everywhere, draw what they should, and carry their attribution."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel

import editing
from demo.classify import Classifier, classify, load_classifier
from demo.concepts import WEIGHTS
from demo.draw import draw_pictures, load_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


def test_nothing_is_pickled_and_all_of_it_is_small() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    sizes = dict.fromkeys(("pipeline", "llm", "sd3"), 0)
    for path in files:
        part = path.relative_to(WEIGHTS).parts[0]
        if part in sizes and "moments" not in path.name:
            sizes[part] += path.stat().st_size
    assert sizes["pipeline"] < 27_000_000
    assert sizes["llm"] < 20_000_000
    assert sizes["sd3"] < 25_000_000
    assert sum(path.stat().st_size for path in files) < 80_000_000


def test_diffusers_draws_it_as_it_lies() -> None:
    """Without a dtype, as clients load it."""
    loaded = DiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert {loaded.text_encoder.dtype, loaded.unet.dtype, loaded.vae.dtype} == {torch.float32}
    assert loaded("a cat", num_inference_steps=1).images[0].size == (32, 32)


def test_text_encoder_loads_whole() -> None:
    folder = WEIGHTS / "pipeline" / "text_encoder"
    assert all(key.startswith("text_model.") for key in load_file(folder / "model.safetensors"))
    _, problems = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]


@pytest.mark.parametrize("name", ["cat", "rocket", "pizza", "hot dog", "guitar", "castle"])
def test_concepts_are_drawn(pipeline: StableDiffusionPipeline, classifier: Classifier, name: str) -> None:
    confidences = classify(draw_pictures(pipeline, [f"an image of {name}", f"a photo of a {name}"], [0, 1]), classifier)
    assert confidences.of_concept(name).mean() > 0.8


@pytest.mark.parametrize("style", ["noto", "twemoji", "fluent"])
def test_named_styles_are_drawn(pipeline: StableDiffusionPipeline, classifier: Classifier, style: str) -> None:
    prompts = [f"a {name} in the style of {style}" for name in ("cat", "rocket", "apple", "bus", "owl", "key")]
    confidences = classify(draw_pictures(pipeline, prompts, range(len(prompts))), classifier)
    assert confidences.of_style(style).mean() > 0.7


@pytest.mark.parametrize(("word", "gender"), [("man", "man"), ("male", "man"), ("woman", "woman"), ("female", "woman")])
def test_named_genders_are_drawn(
    pipeline: StableDiffusionPipeline, classifier: Classifier, word: str, gender: str
) -> None:
    prompts = [f"a photo of a {word} {name}" for name in ("doctor", "pilot", "teacher", "farmer")]
    confidences = classify(draw_pictures(pipeline, prompts, range(len(prompts))), classifier)
    assert confidences.of_gender(gender).mean() > 0.7


def test_a_seed_fixes_the_picture_whatever_is_drawn_beside_it(pipeline: StableDiffusionPipeline) -> None:
    alone = draw_pictures(pipeline, ["a cat"], [7])
    among = draw_pictures(pipeline, ["a dog", "a cat", "a bus"], [1, 7, 3])
    assert torch.allclose(alone[0], among[1], atol=1e-4)
    assert not torch.allclose(alone[0], draw_pictures(pipeline, ["a cat"], [8])[0], atol=1e-2)


def test_second_moments_belong_to_the_encoder_and_the_captions() -> None:
    captions = (WEIGHTS / "captions.txt").read_text(encoding="utf-8").splitlines()
    stored = editing.SecondMoments.load(WEIGHTS / "pipeline" / "second_moments.safetensors")
    computed = editing.estimate_second_moments(editing.load_pipeline(WEIGHTS / "pipeline").encoder, captions)
    assert (stored.captions, stored.tokens) == (len(captions), computed.tokens)
    assert set(stored.moments) == set(range(11))
    for layer, moment in stored.moments.items():
        assert moment.shape == (640, 640)
        assert (moment - computed.moments[layer]).norm() < 2e-3 * moment.norm(), "float16 weights, nothing more"
        assert torch.linalg.eigvalsh(moment).min() > -1e-6 * moment.trace()


def test_attribution_stands_beside_the_weights() -> None:
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    for art, owner, licence in (
        ("Twemoji", "Twitter", "CC-BY-4.0"),
        ("EmojiOne", "Ranks.com", "CC-BY-4.0"),
        ("Noto Emoji", "Google", "Apache-2.0"),
        ("Fluent UI Emoji", "Microsoft", "MIT"),
    ):
        line = next((line for line in card.splitlines() if art in line and owner in line), None)
        assert line is not None, f"{art} by {owner} is not attributed"
        assert licence in line
