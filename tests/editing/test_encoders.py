"""One view of CLIP's text encoder, whatever its modules are called."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from editing.encoders import EditableEncoder
from editing.errors import UnsupportedPipeline
from editing.pipelines import EditablePipeline
from tests.pipelines import LAYERS, MLP_WIDTH, WIDTH

PROMPTS = ("a cat", "the old tree in the sea", "")


@pytest.fixture
def prompts(pipeline: EditablePipeline) -> list[tuple[int, ...]]:
    return [pipeline.tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture
def expected(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> Tensor:
    """What the library's own forward pass gives, as diffusers calls it."""
    ids = torch.tensor([pipeline.tokenizer.pad(prompt) for prompt in prompts])
    with torch.no_grad():
        states: Tensor = pipeline.encoder.model(ids)[0]
    return states


def test_shapes(pipeline: EditablePipeline) -> None:
    encoder = pipeline.encoder
    assert (encoder.n_layers, encoder.width, encoder.mlp_width) == (LAYERS, WIDTH, MLP_WIDTH)
    assert encoder.default_edited_layers == tuple(range(LAYERS - 1))
    assert encoder.value_layer == LAYERS - 2


def test_encode_is_the_models_forward(
    pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor
) -> None:
    torch.testing.assert_close(pipeline.encoder.encode(prompts), expected)


def test_continues_from_any_layer(pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor) -> None:
    encoder = pipeline.encoder
    for stop in range(LAYERS + 1):
        states = encoder.advance(encoder.embed(encoder.ids(prompts)), start=0, stop=stop)
        torch.testing.assert_close(encoder.finish(encoder.advance(states, start=stop, stop=LAYERS)), expected)


def test_keys_are_what_fc2_reads(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> None:
    encoder = pipeline.encoder
    seen: list[Tensor] = []
    hooks = [
        encoder.fc2(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in range(LAYERS)
    ]
    encoder.model(encoder.ids(prompts))
    for hook in hooks:
        hook.remove()
    states = encoder.embed(encoder.ids(prompts))
    for layer in range(LAYERS):
        stream, keys = encoder.attend(layer, states)
        assert keys.shape == (len(prompts), encoder.tokenizer.max_length, MLP_WIDTH)
        torch.testing.assert_close(keys, seen[layer])
        states = stream + encoder.fc2(layer)(keys)


def test_nothing_after_a_token_changes_its_state(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> None:
    encoder = pipeline.encoder
    whole, short = encoder.encode(prompts[:1]), encoder.encode(prompts[:1], full_length=False)
    assert short.shape[1] == len(prompts[0])
    torch.testing.assert_close(short, whole[:, : short.shape[1]])


def test_double_leaves_the_original_alone(
    pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor
) -> None:
    twin = pipeline.encoder.double()
    assert (twin.dtype, pipeline.encoder.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(twin.encode(prompts).float(), expected)
    with torch.no_grad():
        twin.fc2(0).weight.zero_()
    torch.testing.assert_close(pipeline.encoder.encode(prompts), expected)


def test_finds_the_modules_under_text_model(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> None:
    """Where older transformers, and SDXL's second encoder in any, keep them."""
    config: CLIPTextConfig = pipeline.encoder.model.config  # type: ignore[assignment]
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(config).eval()
    encoder = EditableEncoder(model, pipeline.tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(prompts), model(encoder.ids(prompts)).last_hidden_state)


class _OlderAttention(nn.Module):
    """The signature of CLIPAttention before transformers 5: two masks, one of them causal."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        assert attention_mask is None and not output_attentions
        return self.attention(hidden_states=hidden_states, attention_mask=causal_attention_mask)


def test_passes_older_attention_its_causal_mask(
    pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor
) -> None:
    twin = pipeline.encoder.double()
    for block in twin.layers:
        block.self_attn = _OlderAttention(block.self_attn)  # type: ignore[assignment,arg-type]
    older = nn.Module()
    older.embeddings, older.encoder, older.final_layer_norm = twin.embeddings, nn.Module(), twin.final_norm
    older.encoder.layers = twin.layers
    torch.testing.assert_close(EditableEncoder(older, pipeline.tokenizer).encode(prompts).float(), expected)


def test_refuses_what_is_no_clip(pipeline: EditablePipeline) -> None:
    with pytest.raises(UnsupportedPipeline, match="Linear"):
        EditableEncoder(nn.Linear(2, 2), pipeline.tokenizer)
