"""The tokens of many prompts as they run through a text encoder, and means of what they give at chosen sites.

Shapes: N nodes, d width, m width of the keys, c columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from editing.encoders.base import Block, TextEncoder

_ROWS = 512  # rows of keys computed at a time: (512, m)
_CACHED_NODES = 10_000  # more nodes than these compute their keys twice instead of storing (N, m)

Site = tuple[tuple[int, ...], int]
"""A prompt's token ids, and the position in it where a value is written or kept."""
Keys = Callable[[Tensor | slice], Tensor]
"""Returns the keys, the input of the output matrix, at some nodes, (nodes, m)."""


class Nodes(ABC):
    """The tokens of many prompts. A token that several prompts share may be one node.

    A column is the mean over a group of sites of a quantity. Methods take a block and the states of every node in the
    block's dtype; columns are float64. They hold at most three (N, d) and chunks of bounded size, and of a small number
    of nodes the keys (N, m). Where attention is bidirectional, they change the states in place.
    """

    def __init__(self, encoder: TextEncoder, groups: Sequence[Sequence[Site]], *, last: Sequence[int]) -> None:
        """`last` are the nodes of the sites, group by group."""
        device = encoder.device
        self.encoder = encoder
        self._last = torch.tensor(last, device=device)  # (sites,)
        self._column = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)  # (sites,)
        shares = [1 / len(group) for group in groups for _ in group]
        self._share = torch.tensor(shares, dtype=torch.float64, device=device)  # (sites,)
        self.columns = len(groups)
        """c"""

    @abstractmethod
    def __len__(self) -> int:
        """N"""

    @abstractmethod
    def embed(self) -> Tensor:
        """Return the states before block 0, (N, d), in the embeddings' dtype."""

    @abstractmethod
    def attend(self, number: int, block: Block, states: Tensor) -> Tensor:
        """Return the residual stream after attention, (N, d). It may overwrite the states.

        The block is that of this number, or a copy.
        """

    def prepare_keys(self, block: Block, stream: Tensor) -> Keys:
        """Return a function that gives the keys at any node.

        Those of few nodes are computed here once. Those of many do not fit into memory, and are computed each time.
        """
        if len(stream) > _CACHED_NODES:
            return _compute_on_demand(block, stream)
        keys = torch.cat([block.keys(rows) for rows in stream.split(_ROWS)])  # (N, m)
        return lambda nodes: keys[nodes]

    def run_mlp(self, block: Block, stream: Tensor, keys: Keys | None = None, *, out: Tensor | None = None) -> Tensor:
        """Return the states after the block, (N, d), from its residual stream after attention.

        They are written to `out`, which may be the stream itself.
        """
        keys = keys or _compute_on_demand(block, stream)
        states = torch.empty_like(stream) if out is None else out
        for start in range(0, len(stream), _ROWS):
            rows = slice(start, start + _ROWS)
            states[rows] = block.add(stream[rows], block.output_matrix(keys(rows)))
        return states

    def average_keys(self, block: Block, stream: Tensor, keys: Keys | None = None) -> Tensor:
        """Return K (m, c): the mean key at the sites of each column."""
        return self._average(keys or _compute_on_demand(block, stream), width=block.output_matrix.in_features)

    def average_states(self, block: Block, stream: Tensor) -> Tensor:
        """Return the mean states after the block at the sites of each column, (d, c)."""
        return self._average(lambda nodes: block.run_mlp(stream[nodes]), width=stream.shape[1])

    def _average(self, read: Keys, *, width: int) -> Tensor:
        """Average a quantity of the sites over each column, (width, c) float64."""
        means = torch.zeros(self.columns, width, dtype=torch.float64, device=self._last.device)
        chunks = zip(*(x.split(_ROWS) for x in (self._last, self._column, self._share)), strict=True)
        for nodes, column, share in chunks:
            means.index_add_(0, column, read(nodes).double() * share[:, None])
        return means.T


def _compute_on_demand(block: Block, stream: Tensor) -> Keys:
    return lambda nodes: block.keys(stream[nodes])
