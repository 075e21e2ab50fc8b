"""The tree of the prefixes of many prompts, run through a text encoder layer by layer.

Attention is causal: a token's states depend only on the tokens before it, so prompts that begin alike share the states
of their beginning. "a photo of" is computed once for all edits with that template, and BOS once for all.

Shapes: N nodes of the tree, d width, m MLP width, c columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from editing.encoders.clip import EditableEncoder

_KEY_ROWS = 512  # rows of keys computed at a time: (512, m)
_PATH_ROWS = 8192  # states gathered for attention at a time: (8192, d), once for k and once for v
_CACHED_NODES = 10_000  # a tree with more nodes computes its keys twice instead of storing (N, m)

Keys = Callable[[Tensor | slice], Tensor]
"""Returns the keys, the input of fc2, at some nodes, (nodes, m)."""


class PrefixTree:
    """The tree of the prompts' tokens.

    A node is a token after all tokens before it. A column is the mean over a group of prompts of a quantity at their
    last tokens. Methods take a CLIP layer and the states of every node in the layer's dtype; columns are float64. They
    hold at most four (N, d) and chunks of bounded size, and of a small tree the keys (N, m).
    """

    def __init__(self, groups: Sequence[Sequence[tuple[int, ...]]], *, device: torch.device) -> None:
        """Build the tree of prompts, given group by group as token ids from BOS to the last token that matters."""
        prompts = [prompt for group in groups for prompt in group]
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) to the child
        paths: list[tuple[int, ...]] = []  # the nodes from the root to each node
        reached = [-1] * len(prompts)  # the node that each prompt has reached; -1 is above the root
        self._levels: list[tuple[slice, Tensor]] = []  # the nodes of depth t, and their paths (nodes, t)
        # Level by level, so that the nodes of one depth are consecutive.
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
        self._tokens = torch.tensor([token for _, token in nodes], device=device)  # (N,)
        self._depths = torch.tensor([len(path) - 1 for path in paths], device=device)  # (N,): the positions
        self._last = torch.tensor(reached, device=device)  # (prompts,): the nodes of their last tokens
        self._column = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)  # (prompts,)
        shares = [1 / len(group) for group in groups for _ in group]
        self._share = torch.tensor(shares, dtype=torch.float64, device=device)  # (prompts,)
        self.columns = len(groups)
        """c"""

    def __len__(self) -> int:
        """N"""
        return len(self._tokens)

    def embed(self, encoder: EditableEncoder) -> Tensor:
        """Return the states before layer 0, (N, d), in the embeddings' dtype."""
        states: Tensor = encoder.embeddings(input_ids=self._tokens[:, None], position_ids=self._depths[:, None])
        return states[:, 0]

    def attend(self, layer: Any, states: Tensor) -> Tensor:
        """Return the residual stream after attention, (N, d)."""
        attention = layer.self_attn
        heads = attention.num_heads, attention.head_dim
        normed = layer.layer_norm1(states)
        k, v = attention.k_proj(normed), attention.v_proj(normed)  # (N, d)
        for nodes, paths in self._levels:
            for start in range(nodes.start, nodes.stop, step := max(1, _PATH_ROWS // paths.shape[1])):
                rows = slice(start, min(start + step, nodes.stop))
                path = paths[start - nodes.start :][:step]  # (rows, t)
                q = attention.q_proj(normed[rows]).unflatten(1, heads).unsqueeze(2)  # (rows, heads, 1, head_dim)
                # A node attends to its own path: itself and the tokens before it.
                on_path = (x[path].unflatten(2, heads).transpose(1, 2) for x in (k, v))  # (rows, heads, t, head_dim)
                # Reuse `normed` for the output: its rows are read just above and never again.
                normed[rows] = scaled_dot_product_attention(q, *on_path).flatten(1)
        del k, v
        stream: Tensor = attention.out_proj(normed).add_(states)
        return stream

    def prepare_keys(self, layer: Any, stream: Tensor) -> Keys:
        """Return a function that gives the keys at any node.

        The keys of a small tree are computed here once. Those of a large tree do not fit into memory, and are computed
        each time.
        """
        if len(stream) > _CACHED_NODES:
            return _compute_on_demand(layer, stream)
        keys = torch.cat([_compute_keys(layer, rows) for rows in stream.split(_KEY_ROWS)])  # (N, m)
        return lambda nodes: keys[nodes]

    def run_mlp(self, layer: Any, stream: Tensor, keys: Keys | None = None) -> Tensor:
        """Return the states after the layer, (N, d), from its residual stream after attention."""
        keys = keys or _compute_on_demand(layer, stream)
        chunks = (slice(start, start + _KEY_ROWS) for start in range(0, len(stream), _KEY_ROWS))
        return torch.cat([stream[rows] + layer.mlp.fc2(keys(rows)) for rows in chunks])

    def average_keys(self, layer: Any, stream: Tensor, keys: Keys | None = None) -> Tensor:
        """Return K (m, c): the mean key at the last tokens of each column's prompts."""
        return self._average(keys or _compute_on_demand(layer, stream), width=layer.mlp.fc2.in_features)

    def average_states(self, layer: Any, stream: Tensor) -> Tensor:
        """Return the mean states after the layer at the last tokens, (d, c)."""
        last = self._average(lambda nodes: stream[nodes], width=stream.shape[1])
        return last + apply_fc2(layer, self.average_keys(layer, stream))

    def _average(self, read: Keys, *, width: int) -> Tensor:
        """Average a quantity of the last tokens over each column's prompts, (width, c) float64."""
        means = torch.zeros(self.columns, width, dtype=torch.float64, device=self._last.device)
        for nodes, column, share in zip(
            *(x.split(_KEY_ROWS) for x in (self._last, self._column, self._share)), strict=True
        ):
            means.index_add_(0, column, read(nodes).double() * share[:, None])
        return means.T


def apply_fc2(layer: Any, keys: Tensor) -> Tensor:
    """Return the values W k + bias, (d, c) float64, of keys (m, c)."""
    fc2 = layer.mlp.fc2
    values: Tensor = fc2.weight.double() @ keys + fc2.bias.double()[:, None]
    return values


def _compute_on_demand(layer: Any, stream: Tensor) -> Keys:
    return lambda nodes: _compute_keys(layer, stream[nodes])


def _compute_keys(layer: Any, stream: Tensor) -> Tensor:
    """Return the keys (nodes, m): the MLP's activations, which fc2 reads."""
    keys: Tensor = layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(stream)))
    return keys
