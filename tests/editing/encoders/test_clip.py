"""A CLIP text encoder layer by layer, against the library's own forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from editing.encoders.clip import ClipEncoder
from editing.errors import UnsupportedPipeline
from editing.pipelines import EditablePipeline
from editing.prompts import PromptTokenizer
from tests.pipelines import LAYERS, MLP_WIDTH, WIDTH, Family

PROMPTS = ("a cat", "the old tree in the sea", "")


@pytest.fixture
def prompts(pipeline: EditablePipeline) -> list[tuple[int, ...]]:
    return [pipeline.tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture
def expected(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> Tensor:
    """The states of the library's own forward pass, as diffusers calls it."""
    ids = torch.tensor([pipeline.tokenizer.pad(prompt) for prompt in prompts])
    with torch.no_grad():
        states: Tensor = pipeline.encoder.model(ids)[0]
    return states


def test_shapes_and_default_layers(pipeline: EditablePipeline) -> None:
    encoder = pipeline.encoder
    assert (encoder.n_layers, encoder.width, encoder.mlp_width) == (LAYERS, WIDTH, MLP_WIDTH)
    assert encoder.default_edited_layers == tuple(range(LAYERS - 1))
    assert encoder.value_layer == LAYERS - 2


def test_states_equal_the_models_forward_pass(
    pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor
) -> None:
    torch.testing.assert_close(pipeline.encoder.encode(prompts).states, expected)


def test_layers_can_be_split_anywhere(
    pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor
) -> None:
    encoder = pipeline.encoder
    for stop in range(LAYERS + 1):
        states = encoder.run_layers(encoder.embed(encoder.pad(prompts).ids), start=0, stop=stop)
        torch.testing.assert_close(encoder.normalize(encoder.run_layers(states, start=stop, stop=LAYERS)), expected)


def test_keys_are_the_inputs_of_fc2(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> None:
    encoder = pipeline.encoder
    inputs_of_fc2: list[Tensor] = []
    hooks = [
        encoder.output_matrix(layer).register_forward_pre_hook(lambda _, inputs: inputs_of_fc2.append(inputs[0]))
        for layer in range(LAYERS)
    ]
    encoder.model(encoder.pad(prompts).ids)
    for hook in hooks:
        hook.remove()
    states = encoder.embed(encoder.pad(prompts).ids)
    for layer in range(LAYERS):
        stream, keys = encoder.attend(layer, states)
        assert keys.shape == (len(prompts), encoder.tokenizer.max_length, MLP_WIDTH)
        torch.testing.assert_close(keys, inputs_of_fc2[layer])
        states = stream + encoder.output_matrix(layer)(keys)


def test_later_tokens_do_not_change_a_state(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> None:
    encoder = pipeline.encoder
    whole, short = (encoder.encode(prompts[:1], full_length=full).states for full in (True, False))
    assert short.shape[1] == len(prompts[0])
    torch.testing.assert_close(short, whole[:, : short.shape[1]])


def test_double_does_not_change_the_original(
    pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor
) -> None:
    twin = pipeline.encoder.double()
    assert (twin.dtype, pipeline.encoder.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(twin.encode(prompts).states.float(), expected)
    with torch.no_grad():
        twin.output_matrix(0).weight.zero_()
    torch.testing.assert_close(pipeline.encoder.encode(prompts).states, expected)


def test_modules_below_text_model_are_found(pipeline: EditablePipeline, prompts: list[tuple[int, ...]]) -> None:
    """Older transformers keep them there, and SDXL's second encoder in any version."""
    config: CLIPTextConfig = pipeline.encoder.model.config
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(config).eval()
    encoder = ClipEncoder(model, pipeline.tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(prompts).states, model(encoder.pad(prompts).ids).last_hidden_state)


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


def test_older_attention_gets_its_causal_mask(
    pipeline: EditablePipeline, prompts: list[tuple[int, ...]], expected: Tensor
) -> None:
    twin = pipeline.encoder.double()
    for block in twin.blocks:
        block.layer.self_attn = _OlderAttention(block.layer.self_attn)
    older = nn.Module()
    older.embeddings, older.encoder, older.final_layer_norm = twin.embeddings, nn.Module(), twin.final_norm
    older.encoder.layers = nn.ModuleList([block.layer for block in twin.blocks])
    torch.testing.assert_close(ClipEncoder(older, pipeline.tokenizer).encode(prompts).states.float(), expected)


FULL_SIZE: list[tuple[Family, str, dict[str, Any], tuple[int, int, int], tuple[int, ...]]] = [
    ("sd1", "text_encoder", {"hidden_size": 768, "num_hidden_layers": 12}, (12, 768, 3072), tuple(range(11))),
    ("sd2", "text_encoder", {"hidden_size": 1024, "num_hidden_layers": 23}, (23, 1024, 4096), tuple(range(22))),
    ("sdxl", "text_encoder", {"hidden_size": 768, "num_hidden_layers": 12}, (12, 768, 3072), (8, 9, 10)),
    (
        "sdxl",
        "text_encoder_2",
        {"hidden_size": 1280, "num_hidden_layers": 32, "projection_dim": 1280},
        (32, 1280, 5120),
        (26, 27, 28, 29, 30),
    ),
]


@pytest.mark.parametrize(("family", "name", "changes", "shape", "edited"), FULL_SIZE)
def test_shapes_of_full_size_encoders(
    tokenizer: PromptTokenizer,
    family: Family,
    name: str,
    changes: dict[str, Any],
    shape: tuple[int, int, int],
    edited: tuple[int, ...],
) -> None:
    """CLIP-L, OpenCLIP-H and OpenCLIP-bigG, on the meta device."""
    config = CLIPTextConfig(
        vocab_size=49408,
        intermediate_size=4 * changes["hidden_size"],
        num_attention_heads=changes["hidden_size"] // 64,
        max_position_embeddings=77,
        **changes,
    )
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(config)
    encoder = ClipEncoder(model, tokenizer, name=name, family=family)
    assert (encoder.n_layers, encoder.width, encoder.mlp_width) == shape
    assert encoder.default_edited_layers == edited
    encoding = encoder.encode([tokenizer.encode(prompt).ids for prompt in PROMPTS])
    assert encoding.states.shape == (len(PROMPTS), tokenizer.max_length, encoder.width)
    assert encoding.pooled is not None
    assert encoding.pooled.shape == (len(PROMPTS), encoder.width)


def test_another_model_is_refused(pipeline: EditablePipeline) -> None:
    with pytest.raises(UnsupportedPipeline, match="Linear"):
        ClipEncoder(nn.Linear(2, 2), pipeline.tokenizer)
