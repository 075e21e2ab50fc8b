"""Every distinct prefix of many prompts, once, carried through a text encoder layer by layer.

Attention is causal, so a token's states depend on the tokens before it and on nothing else: prompts that begin alike
share the states of their beginning. "a photo of" is computed once for all edits of that template, BOS once for all.

Shapes: N nodes of the tree, d width, m MLP width, c columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from editing.encoders.clip import EditableEncoder

_ROWS = 512  # keys held at a time: (512, m)
_GATHERED = 8192  # states gathered for attention at a time: (8192, d), twice
_KEPT = 10_000  # nodes whose keys are kept rather than computed twice: (10,000, m)

Keys = Callable[[Tensor | slice], Tensor]
"""What fc2 reads at some nodes, (nodes, m)."""


class PrefixTree:
    """The tree of the prompts' tokens. A node is a token after all those before it; a column is the mean over a group
    of prompts of what is at their last tokens.

    `attend` and `advance` take a CLIP layer and the states of every node, in the layer's dtype; columns are float64.
    They hold four (N, d) at most, and chunks of bounded size; of a small tree the keys, (N, m), as well.
    """

    def __init__(self, groups: Sequence[Sequence[tuple[int, ...]]], *, device: torch.device) -> None:
        """Prompts as token ids from BOS to the last token that matters, group by group."""
        prompts = [prompt for group in groups for prompt in group]
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) to the child
        paths: list[tuple[int, ...]] = []
        reached = [-1] * len(prompts)
        self._levels: list[tuple[slice, Tensor]] = []  # the nodes of one depth t, and their paths (nodes, t)
        for depth in range(max(map(len, prompts))):
            first = len(paths)
            for index, prompt in enumerate(prompts):
                if depth < len(prompt):
                    edge = reached[index], prompt[depth]
                    if edge not in nodes:
                        nodes[edge] = len(paths)
                        paths.append((*(paths[edge[0]] if depth else ()), len(paths)))
                    reached[index] = nodes[edge]
            self._levels.append((slice(first, len(paths)), torch.tensor(paths[first:], device=device)))
        self._tokens = torch.tensor([token for _, token in nodes], device=device)
        self._depths = torch.tensor([len(path) - 1 for path in paths], device=device)
        self._last = torch.tensor(reached, device=device)  # (prompts,)
        self._column = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)
        shares = [1 / len(group) for group in groups for _ in group]
        self._share = torch.tensor(shares, dtype=torch.float64, device=device)
        self.columns = len(groups)

    def __len__(self) -> int:
        """N"""
        return len(self._tokens)

    def embed(self, encoder: EditableEncoder) -> Tensor:
        """The states before layer 0, (N, d), in the embeddings' dtype."""
        states: Tensor = encoder.embeddings(input_ids=self._tokens[:, None], position_ids=self._depths[:, None])
        return states[:, 0]

    def attend(self, layer: Any, states: Tensor) -> Tensor:
        """The residual stream after attention, (N, d)."""
        attention = layer.self_attn
        split = attention.num_heads, attention.head_dim
        normed = layer.layer_norm1(states)
        k, v = attention.k_proj(normed), attention.v_proj(normed)
        for nodes, paths in self._levels:
            for start in range(nodes.start, nodes.stop, step := max(1, _GATHERED // paths.shape[1])):
                rows = slice(start, min(start + step, nodes.stop))
                path = paths[start - nodes.start :][:step]
                q = attention.q_proj(normed[rows]).unflatten(1, split).unsqueeze(2)  # (rows, heads, 1, head_dim)
                seen = (x[path].unflatten(2, split).transpose(1, 2) for x in (k, v))  # (rows, heads, t, head_dim)
                normed[rows] = scaled_dot_product_attention(q, *seen).flatten(1)  # read before, and not again
        del k, v
        stream: Tensor = attention.out_proj(normed).add_(states)
        return stream

    def keys(self, layer: Any, stream: Tensor) -> Keys:
        """What fc2 reads at any node. Of a small tree it is computed for all of them here and now; of a large one
        whenever it is asked for, since memory has no room for it."""
        if len(stream) > _KEPT:
            return _reads(layer, stream)
        kept = torch.cat([_keys(layer, rows) for rows in stream.split(_ROWS)])
        return lambda nodes: kept[nodes]

    def advance(self, layer: Any, stream: Tensor, keys: Keys | None = None) -> Tensor:
        """The states after the layer, (N, d), from its residual stream after attention; its keys, if they are known."""
        read = keys or _reads(layer, stream)
        chunks = (slice(start, start + _ROWS) for start in range(0, len(stream), _ROWS))
        return torch.cat([stream[rows] + layer.mlp.fc2(read(rows)) for rows in chunks])

    def last_keys(self, layer: Any, stream: Tensor, keys: Keys | None = None) -> Tensor:
        """What fc2 reads at the prompts' last tokens, (m, c)."""
        return self._mean(keys or _reads(layer, stream), width=layer.mlp.fc2.in_features)

    def states_after(self, layer: Any, stream: Tensor) -> Tensor:
        """The states after the layer at the prompts' last tokens, (d, c): what `advance` gives, there alone."""
        last = self._mean(lambda nodes: stream[nodes], width=stream.shape[1])
        return last + recall(layer, self.last_keys(layer, stream))

    def _mean(self, read: Keys, *, width: int) -> Tensor:
        means = torch.zeros(self.columns, width, dtype=torch.float64, device=self._last.device)
        for nodes, column, share in zip(
            *(x.split(_ROWS) for x in (self._last, self._column, self._share)), strict=True
        ):
            means.index_add_(0, column, read(nodes).double() * share[:, None])
        return means.T


def recall(layer: Any, keys: Tensor) -> Tensor:
    """What fc2 gives for keys (m, c), bias included, (d, c) float64."""
    fc2 = layer.mlp.fc2
    given: Tensor = fc2.weight.double() @ keys + fc2.bias.double()[:, None]
    return given


def _reads(layer: Any, stream: Tensor) -> Keys:
    return lambda nodes: _keys(layer, stream[nodes])


def _keys(layer: Any, stream: Tensor) -> Tensor:
    keys: Tensor = layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(stream)))
    return keys
