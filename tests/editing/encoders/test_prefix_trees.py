"""The tree of prompt prefixes, against the encoder's own pass over padded prompts."""

import pytest
import torch
from torch import Tensor

from editing.encoders import nodes, prefix_trees
from editing.encoders.clip import ClipEncoder
from editing.encoders.nodes import Site
from editing.encoders.prefix_trees import PrefixTree
from editing.pipelines import EditablePipeline

# Several templates; subjects of one and of many tokens; a prompt that begins another; one that is in two groups.
GROUPS = (("a photo of cat", "cat"), ("a photo of cats and dogs",), ("a photo",), ("the sea", "cat", "a small boat"))


@pytest.fixture
def encoder(pipeline: EditablePipeline) -> ClipEncoder:
    assert isinstance(pipeline.encoder, ClipEncoder)
    return pipeline.encoder.double()


@pytest.fixture
def groups(encoder: ClipEncoder) -> list[list[Site]]:
    return [[find_site(encoder, prompt) for prompt in group] for group in GROUPS]


def find_site(encoder: ClipEncoder, prompt: str) -> Site:
    position = encoder.tokenizer.locate("{}", prompt)
    return position.prefix, position.last_subject_index


def encode_whole(encoder: ClipEncoder, group: list[Site], *, layers: int) -> tuple[Tensor, Tensor]:
    """Return the mean states at the last tokens after `layers` layers, and the mean keys of the next layer."""
    states = encoder.run_layers(encoder.embed(encoder.pad([ids for ids, _ in group]).ids), start=0, stop=layers)
    _, keys = encoder.attend(layers, states)
    last = torch.arange(len(group)), torch.tensor([index for _, index in group])
    return states[last].mean(0), keys[last].mean(0)


def run_tree(tree: PrefixTree, encoder: ClipEncoder, *, layers: int) -> Tensor:
    """Return the states of every node after `layers` layers."""
    states = tree.embed().double()
    for number, block in enumerate(encoder.blocks[:layers]):
        states = tree.run_mlp(block, tree.attend(number, block, states))
    return states


@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_columns_equal_the_means_of_the_encoders_own_pass(
    encoder: ClipEncoder, groups: list[list[Site]], monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    if chunked:
        monkeypatch.setattr(nodes, "_ROWS", 2)
        monkeypatch.setattr(prefix_trees, "_PATH_ROWS", 5)
        monkeypatch.setattr(nodes, "_CACHED_NODES", 0)
    tree = PrefixTree(encoder, groups)
    block = encoder.blocks[2]
    stream = tree.attend(2, block, run_tree(tree, encoder, layers=2))
    all_keys = tree.prepare_keys(block, stream)
    keys, states = tree.average_keys(block, stream, all_keys), tree.average_states(block, stream)
    assert torch.equal(tree.run_mlp(block, stream, all_keys), tree.run_mlp(block, stream))
    assert (keys.shape, states.shape) == ((encoder.mlp_width, len(groups)), (encoder.width, len(groups)))
    for column, group in enumerate(groups):
        torch.testing.assert_close(keys[:, column], encode_whole(encoder, group, layers=2)[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(states[:, column], encode_whole(encoder, group, layers=3)[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_large_tree_computes_its_keys_in_chunks(
    encoder: ClipEncoder, groups: list[list[Site]], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    block = encoder.blocks[0]
    compute_keys = block.keys
    monkeypatch.setattr(nodes, "_ROWS", 3)
    monkeypatch.setattr(nodes, "_CACHED_NODES", 10)

    def count(stream: Tensor) -> Tensor:
        computed.append(len(stream))
        return compute_keys(stream)

    monkeypatch.setattr(block, "keys", count)
    tree = PrefixTree(encoder, groups)
    stream = tree.attend(0, block, tree.embed().double())
    assert len(tree) > 10
    all_keys = tree.prepare_keys(block, stream)
    assert not computed
    tree.average_keys(block, stream, all_keys)
    tree.run_mlp(block, stream, all_keys)
    assert max(computed) == 3


def test_each_prefix_is_one_node(encoder: ClipEncoder, groups: list[list[Site]]) -> None:
    prompts = [ids for group in groups for ids, _ in group]
    assert len(PrefixTree(encoder, groups)) == len(
        {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    )
