"""The tree of prompt prefixes, against the encoder's own pass over whole padded prompts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from editing.encoders.clip import EditableEncoder
from editing.pipelines import EditablePipeline
from editing.stage_two import prefixes
from editing.stage_two.prefixes import PrefixTree, recall

# templates mixed, subjects of one and of many tokens, one prompt the beginning of another, one of two groups
GROUPS = (("a photo of cat", "cat"), ("a photo of cats and dogs",), ("a photo",), ("the sea", "cat", "a small boat"))


@pytest.fixture
def encoder(pipeline: EditablePipeline) -> EditableEncoder:
    return pipeline.encoder.double()


@pytest.fixture
def groups(encoder: EditableEncoder) -> list[list[tuple[int, ...]]]:
    return [[encoder.tokenizer.locate("{}", prompt).prefix for prompt in group] for group in GROUPS]


def whole(encoder: EditableEncoder, group: list[tuple[int, ...]], *, layers: int) -> tuple[Tensor, Tensor]:
    """After `layers` layers: the states at the last tokens and the keys of the next layer, (d,) and (m,), means."""
    states = encoder.advance(encoder.embed(encoder.ids(group)), start=0, stop=layers)
    _, keys = encoder.attend(layers, states)
    last = torch.arange(len(group)), torch.tensor([len(prompt) - 1 for prompt in group])
    return states[last].mean(0), keys[last].mean(0)


def walk(tree: PrefixTree, encoder: EditableEncoder, *, layers: int) -> Tensor:
    """The states of every node after `layers` layers."""
    states = tree.embed(encoder).double()
    for layer in encoder.layers[:layers]:
        states = tree.advance(layer, tree.attend(layer, states))
    return states


@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_gives_the_means_of_the_encoders_own_pass(
    encoder: EditableEncoder, groups: list[list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    if chunked:
        monkeypatch.setattr(prefixes, "_ROWS", 2)
        monkeypatch.setattr(prefixes, "_GATHERED", 5)
        monkeypatch.setattr(prefixes, "_KEPT", 0)
    tree = PrefixTree(groups, device=encoder.device)
    layer = encoder.layers[2]
    stream = tree.attend(layer, walk(tree, encoder, layers=2))
    read = tree.keys(layer, stream)
    keys, states = tree.last_keys(layer, stream, read), tree.states_after(layer, stream)
    assert torch.equal(tree.advance(layer, stream, read), tree.advance(layer, stream))
    assert (keys.shape, states.shape) == ((encoder.mlp_width, len(groups)), (encoder.width, len(groups)))
    for column, group in enumerate(groups):
        torch.testing.assert_close(keys[:, column], whole(encoder, group, layers=2)[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(states[:, column], whole(encoder, group, layers=3)[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_of_a_large_tree_never_holds_more_keys_than_a_chunk(
    encoder: EditableEncoder, groups: list[list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    keys_of = prefixes._keys
    monkeypatch.setattr(prefixes, "_ROWS", 3)
    monkeypatch.setattr(prefixes, "_KEPT", 10)

    def count_keys(layer: Any, stream: Tensor) -> Tensor:
        held.append(len(stream))
        return keys_of(layer, stream)

    monkeypatch.setattr(prefixes, "_keys", count_keys)
    tree = PrefixTree(groups, device=encoder.device)
    stream = tree.attend(encoder.layers[0], tree.embed(encoder).double())
    assert len(tree) > 10
    read = tree.keys(encoder.layers[0], stream)
    assert not held
    tree.last_keys(encoder.layers[0], stream, read)
    tree.advance(encoder.layers[0], stream, read)
    assert max(held) == 3


def test_holds_each_prefix_once(encoder: EditableEncoder, groups: list[list[tuple[int, ...]]]) -> None:
    prompts = [prompt for group in groups for prompt in group]
    assert len(PrefixTree(groups, device=encoder.device)) == len(
        {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    )


@torch.no_grad()
def test_recalls_what_fc2_gives(encoder: EditableEncoder) -> None:
    layer = copy.deepcopy(encoder.layers[1]).float()
    keys = torch.randn(encoder.mlp_width, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fc2 = layer.get_submodule("mlp.fc2")
    torch.testing.assert_close(recall(layer, keys), fc2(keys.T.float()).double().T, rtol=1e-5, atol=1e-6)
