"""What the engine makes of prompts in every family equals what diffusers' own pipeline makes of them.

The pipelines are small and random, but of the real classes: templates, taps, padding, masks and their order are those
of the libraries. `make conformance` prints the families and the worst difference.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from editing.condition import Condition
from editing.encoders.base import TextEncoder
from editing.encoders.load import load_encoders
from editing.families.conditions import encode_prompts
from editing.families.registry import FAMILIES
from tests.families import TEXTS, TinyText, write_text_parts
from tests.pipelines import write_pipeline

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
PROMPTS = {
    "plain": ["a photo of a cat"],
    "empty": [""],
    "spaces and capitals": ["  The OLD tree,\n in the sea!  "],
    "markup": ["star <b> & <div>cat</div>"],
    "unicode": ["naïve café 猫 🐱 İstanbul e\u0301"],
    "long": ["a very long cat " * 150],
    "a batch": ["a cat", "", "a small boat by the river in the evening"],
}
CLIP_FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=[*CLIP_FAMILIES, *TEXTS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conformance") / name
    return write_pipeline(folder, family=name) if name in CLIP_FAMILIES else write_text_parts(folder, name)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoders(written: Path) -> tuple[TextEncoder, ...]:
    return load_encoders(written)


@pytest.fixture(scope="module")
def reference(name: str, written: Path) -> Any:
    """The pipeline of diffusers with its text encoders alone."""
    index = json.loads((written / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    arguments = [each for each in inspect.signature(kind.__init__).parameters if each in index]
    text = [each for each in arguments if each.startswith(("text_encoder", "tokenizer"))]
    parts = {each: getattr(transformers, index[each][1]).from_pretrained(written / each) for each in text}
    return kind(**{**dict.fromkeys(arguments), **parts})


def encode_with_diffusers(reference: Any, prompts: list[str], *, tiny: TinyText | None, negative: bool) -> Condition:
    """Return what the pipeline's `encode_prompt` gives for prompts, or for negative prompts."""
    arguments = inspect.signature(reference.encode_prompt).parameters
    options: dict[str, Any] = dict(tiny.options) if tiny else {"num_images_per_prompt": 1}
    if "do_classifier_free_guidance" in arguments:
        options["do_classifier_free_guidance"] = negative
    if negative:
        options["negative_prompt"] = list(prompts)
    if "complex_human_instruction" in arguments:  # the default of the pipeline's call
        options["complex_human_instruction"] = (
            inspect.signature(type(reference).__call__).parameters["complex_human_instruction"].default
        )
    shown = ["a dog"] * len(prompts) if negative else list(prompts)  # a pipeline may change the list
    with torch.no_grad():
        output = reference.encode_prompt(shown, device="cpu", **options)
    return _READ[type(reference).__name__](output, negative)


def _read_lists(output: Any, negative: bool) -> Condition:
    rows = output[int(negative)]
    longest = max(map(len, rows))
    states = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    return Condition(states, torch.tensor([[position < len(row) for position in range(longest)] for row in rows]))


def _read_masked(output: Any, negative: bool) -> Condition:
    states, mask = output[2 * negative : 2 * negative + 2]
    return Condition(states, None if mask is None else mask.bool())


def _read_chroma(output: Any, negative: bool) -> Condition:
    states, _, mask = output[3 * negative : 3 * negative + 3]
    return Condition(states, mask.bool())


_READ: dict[str, Callable[[Any, bool], Condition]] = {
    "StableDiffusionPipeline": lambda output, negative: Condition(output[negative]),
    "StableDiffusionXLPipeline": lambda output, negative: Condition(output[negative], pooled=output[2 + negative]),
    "StableDiffusion3Pipeline": lambda output, negative: Condition(output[negative], pooled=output[2 + negative]),
    "FluxPipeline": lambda output, _: Condition(output[0], pooled=output[1]),
    "ChromaPipeline": _read_chroma,
    "PixArtAlphaPipeline": _read_masked,
    "PixArtSigmaPipeline": _read_masked,
    "AuraFlowPipeline": lambda output, negative: Condition(output[2 * negative]),  # the transformer takes no mask
    "ZImagePipeline": _read_lists,
    "Flux2KleinPipeline": lambda output, _: Condition(output[0]),
    "QwenImagePipeline": _read_masked,
    "Lumina2Pipeline": _read_masked,
    "SanaPipeline": _read_masked,
}


def assert_equal(found: Condition, expected: Condition) -> float:
    """Compare two conditions and return their largest difference."""
    assert (found.mask is None) == (expected.mask is None)
    if expected.mask is not None:
        assert found.mask is not None
        assert torch.equal(found.mask, expected.mask)
    pairs: list[tuple[Tensor | None, Tensor | None]] = [
        (found.states, expected.states),
        (found.pooled, expected.pooled),
    ]
    worst = 0.0
    for one, two in pairs:
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, **EXACT)
            worst = max(worst, float((one - two).abs().max()))
    return worst


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_condition_equals_that_of_the_pipeline(
    name: str,
    encoders: tuple[TextEncoder, ...],
    reference: Any,
    prompts: list[str],
    record_difference: Callable[[str, float], None],
) -> None:
    expected = encode_with_diffusers(reference, prompts, tiny=TEXTS.get(name), negative=False)
    record_difference(name, assert_equal(encode_prompts(encoders, prompts), expected))


@pytest.mark.parametrize("prompts", [[""], ["a blurred photo"]], ids=["empty", "text"])
def test_negative_condition_equals_that_of_the_pipeline(
    name: str,
    encoders: tuple[TextEncoder, ...],
    reference: Any,
    prompts: list[str],
    record_difference: Callable[[str, float], None],
) -> None:
    if "negative_prompt" not in inspect.signature(reference.encode_prompt).parameters:
        pytest.skip("the pipeline encodes negative prompts as it encodes prompts")
    if name == "sdxl" and prompts == [""]:
        pytest.skip("SDXL has zeros for the empty prompt: see the tests of load_pipeline")
    expected = encode_with_diffusers(reference, prompts, tiny=TEXTS.get(name), negative=True)
    record_difference(name, assert_equal(encode_prompts(encoders, prompts, negative=True), expected))


def test_every_family_is_compared() -> None:
    compared = {*CLIP_FAMILIES, *(name.partition("-")[0] for name in TEXTS)}
    assert compared == FAMILIES.keys()
