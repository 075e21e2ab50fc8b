"""Which token each position of a condition shows."""

import pytest
import torch

from editing.encoders.base import TextEncoder
from editing.encoders.load import load_encoders
from editing.families.conditions import encode_with_origins
from editing.families.qwen_image import QWEN_IMAGE
from tests.families import TEXTS, write_text_parts
from tests.pipelines import write_pipeline

PROMPTS = ["a cat", "a small boat by the river"]


@pytest.fixture(scope="module", params=["sd1", "sdxl", *TEXTS])
def encoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextEncoder, ...]:
    folder = tmp_path_factory.mktemp("parts") / request.param
    if request.param in TEXTS:
        return load_encoders(write_text_parts(folder, request.param))
    return load_encoders(write_pipeline(folder, family=request.param))


@torch.no_grad()
def test_positions_show_the_states_of_their_tokens(encoders: tuple[TextEncoder, ...]) -> None:
    condition, origins = encode_with_origins(encoders, PROMPTS)
    encodings = [encoder.encode_texts(PROMPTS) for encoder in encoders]
    assert origins.encoder.shape == origins.position.shape == condition.states.shape[:2]
    for row, prompt in enumerate(PROMPTS):
        shown = set()
        for state, number, position in zip(
            condition.states[row], origins.encoder[row].tolist(), origins.position[row].tolist(), strict=True
        ):
            if number < 0:
                continue
            encoding = encodings[number]
            start = int(encoding.mask[row].int().argmax())
            token = encoding.states[row, start + position]
            torch.testing.assert_close(state[: len(token)], token)
            shown.add((number, position))
        for number, encoder in enumerate(encoders):
            if not encoder.spec.taps or (encoder.family == "sdxl" and number == 1):
                continue
            if encoder.family == "sd3" and number == 1:  # it stands beside the first
                continue
            dropped = QWEN_IMAGE.dropped_tokens if encoder.family == "qwen_image" else 0
            tokens = len(encoder.tokenizer.encode(prompt).ids)
            last = range(tokens - 3, tokens) if encoder.family == "sana" else range(dropped, tokens)
            assert {(number, position) for position in last} <= shown


def test_masked_positions_have_no_origin(encoders: tuple[TextEncoder, ...]) -> None:
    condition, origins = encode_with_origins(encoders, PROMPTS)
    if condition.mask is not None:
        assert torch.equal(origins.encoder >= 0, condition.mask)
    elif encoders[0].family == "auraflow":
        assert torch.equal(origins.encoder >= 0, (condition.states != 0).any(-1))
    else:
        assert bool((origins.encoder >= 0).all())
