"""The tree of prompt prefixes, against the encoder's own pass over padded prompts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from editing.encoders.clip import EditableEncoder
from editing.pipelines import EditablePipeline
from editing.stage_two import prefixes
from editing.stage_two.prefixes import PrefixTree, apply_fc2

# Several templates; subjects of one and of many tokens; a prompt that begins another; one that is in two groups.
GROUPS = (("a photo of cat", "cat"), ("a photo of cats and dogs",), ("a photo",), ("the sea", "cat", "a small boat"))


@pytest.fixture
def encoder(pipeline: EditablePipeline) -> EditableEncoder:
    return pipeline.encoder.double()


@pytest.fixture
def groups(encoder: EditableEncoder) -> list[list[tuple[int, ...]]]:
    return [[encoder.tokenizer.locate("{}", prompt).prefix for prompt in group] for group in GROUPS]


def encode_whole(encoder: EditableEncoder, group: list[tuple[int, ...]], *, layers: int) -> tuple[Tensor, Tensor]:
    """Return the mean states at the last tokens after `layers` layers, and the mean keys of the next layer."""
    states = encoder.run_layers(encoder.embed(encoder.pad_ids(group)), start=0, stop=layers)
    _, keys = encoder.attend(layers, states)
    last = torch.arange(len(group)), torch.tensor([len(prompt) - 1 for prompt in group])
    return states[last].mean(0), keys[last].mean(0)


def run_tree(tree: PrefixTree, encoder: EditableEncoder, *, layers: int) -> Tensor:
    """Return the states of every node after `layers` layers."""
    states = tree.embed(encoder).double()
    for layer in encoder.layers[:layers]:
        states = tree.run_mlp(layer, tree.attend(layer, states))
    return states


@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_columns_equal_the_means_of_the_encoders_own_pass(
    encoder: EditableEncoder, groups: list[list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    if chunked:
        monkeypatch.setattr(prefixes, "_KEY_ROWS", 2)
        monkeypatch.setattr(prefixes, "_PATH_ROWS", 5)
        monkeypatch.setattr(prefixes, "_CACHED_NODES", 0)
    tree = PrefixTree(groups, device=encoder.device)
    layer = encoder.layers[2]
    stream = tree.attend(layer, run_tree(tree, encoder, layers=2))
    all_keys = tree.prepare_keys(layer, stream)
    keys, states = tree.average_keys(layer, stream, all_keys), tree.average_states(layer, stream)
    assert torch.equal(tree.run_mlp(layer, stream, all_keys), tree.run_mlp(layer, stream))
    assert (keys.shape, states.shape) == ((encoder.mlp_width, len(groups)), (encoder.width, len(groups)))
    for column, group in enumerate(groups):
        torch.testing.assert_close(keys[:, column], encode_whole(encoder, group, layers=2)[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(states[:, column], encode_whole(encoder, group, layers=3)[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_large_tree_computes_its_keys_in_chunks(
    encoder: EditableEncoder, groups: list[list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    compute_keys = prefixes._compute_keys
    monkeypatch.setattr(prefixes, "_KEY_ROWS", 3)
    monkeypatch.setattr(prefixes, "_CACHED_NODES", 10)

    def count(layer: Any, stream: Tensor) -> Tensor:
        computed.append(len(stream))
        return compute_keys(layer, stream)

    monkeypatch.setattr(prefixes, "_compute_keys", count)
    tree = PrefixTree(groups, device=encoder.device)
    stream = tree.attend(encoder.layers[0], tree.embed(encoder).double())
    assert len(tree) > 10
    all_keys = tree.prepare_keys(encoder.layers[0], stream)
    assert not computed
    tree.average_keys(encoder.layers[0], stream, all_keys)
    tree.run_mlp(encoder.layers[0], stream, all_keys)
    assert max(computed) == 3


def test_each_prefix_is_one_node(encoder: EditableEncoder, groups: list[list[tuple[int, ...]]]) -> None:
    prompts = [prompt for group in groups for prompt in group]
    assert len(PrefixTree(groups, device=encoder.device)) == len(
        {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    )


@torch.no_grad()
def test_apply_fc2_equals_the_layers_fc2(encoder: EditableEncoder) -> None:
    layer = copy.deepcopy(encoder.layers[1]).float()
    keys = torch.randn(encoder.mlp_width, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        apply_fc2(layer, keys), layer.get_submodule("mlp.fc2")(keys.T.float()).double().T, rtol=1e-5, atol=1e-6
    )
