"""The trees of the prefixes of many prompts, run through a causal text encoder block by block.

Attention is causal: a token's states depend only on the tokens before it, so prompts that begin alike share the states
of their beginning. "a photo of" is computed once for all edits with that template, and BOS once for all.

Shapes: N nodes of a tree, d width.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from editing.encoders.base import Block, TextEncoder
from editing.encoders.clip import ClipEncoder
from editing.encoders.decoder import DecoderEncoder
from editing.encoders.nodes import Nodes, Site

_PATH_ROWS = 8192  # states gathered for attention at a time: (8192, d), once for k and once for v
_PACK_NODES = 1024  # nodes of a tree that one sequence has: its mask is (1024, 1024)


class _Tree:
    """The nodes of prompts' prefixes: a node is a token after all tokens before it."""

    def __init__(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) to the child
        self.paths: list[tuple[int, ...]] = []
        """The nodes from the root to each node."""
        self.levels: list[slice] = []
        """The nodes of each depth."""
        self.last = [-1] * len(prefixes)
        """The node that each prefix ends in."""
        self.visits: list[int] = []
        """The number of prefixes that each node is in."""
        # Level by level, so that the nodes of one depth are consecutive. The node -1 is above the root.
        for depth in range(max(map(len, prefixes))):
            first = len(self.paths)
            for index, prefix in enumerate(prefixes):
                if depth < len(prefix):
                    edge = self.last[index], prefix[depth]
                    if edge not in nodes:
                        nodes[edge] = len(self.paths)
                        self.paths.append((*(self.paths[edge[0]] if depth else ()), len(self.paths)))
                        self.visits.append(0)
                    self.last[index] = nodes[edge]
                    self.visits[nodes[edge]] += 1
            self.levels.append(slice(first, len(self.paths)))
        self.tokens = [token for _, token in nodes]
        self.depths = [len(path) - 1 for path in self.paths]

    def find_ancestors(self) -> Tensor:
        """Return which nodes are on the path to each node, (nodes, nodes) bool, itself included."""
        found = torch.eye(len(self.paths), dtype=torch.bool)
        for node, path in enumerate(self.paths):
            if len(path) > 1:
                found[node] |= found[path[-2]]
        return found


class PrefixTree(Nodes):
    """One tree of all prefixes in a CLIP encoder, with attention along the paths."""

    def __init__(self, encoder: ClipEncoder, groups: Sequence[Sequence[Site]]) -> None:
        tree = _Tree([ids[: index + 1] for group in groups for ids, index in group])
        super().__init__(encoder, groups, last=tree.last)
        device = encoder.device
        self._embeddings = encoder.embeddings
        self._tokens = torch.tensor(tree.tokens, device=device)  # (N,)
        self._depths = torch.tensor(tree.depths, device=device)  # (N,): the positions
        # The nodes of depth t, and their paths (nodes, t).
        self._levels = [(level, torch.tensor(tree.paths[level], device=device)) for level in tree.levels]

    def __len__(self) -> int:
        return len(self._tokens)

    def embed(self) -> Tensor:
        states: Tensor = self._embeddings(input_ids=self._tokens[:, None], position_ids=self._depths[:, None])
        return states[:, 0]

    def attend(self, number: int, block: Block, states: Tensor) -> Tensor:  # noqa: ARG002
        layer = block.layer
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


class PackedTrees(Nodes):
    """Trees of prefixes in a decoder, each as one sequence for the library's own attention.

    A node's position is its depth, and a mask lets it attend to its ancestors alone. A sequence has a bounded number of
    nodes; the beginning that all prompts share is repeated in each.
    """

    def __init__(self, encoder: TextEncoder, groups: Sequence[Sequence[Site]]) -> None:
        prefixes = [ids[: index + 1] for group in groups for ids, index in group]
        last: list[int] = []
        self._trees: list[tuple[slice, _Tree]] = []
        count = 0
        for pack in _pack(prefixes):
            tree = _Tree(pack)
            last += [count + node for node in tree.last]
            self._trees.append((slice(count, count + len(tree.tokens)), tree))
            count += len(tree.tokens)
        super().__init__(encoder, groups, last=last)
        assert isinstance(encoder, DecoderEncoder)
        self._decoder = encoder
        self._count = count
        device = encoder.device
        self.visits = torch.tensor([count for _, tree in self._trees for count in tree.visits], device=device)
        """(N,): the number of prompts that each node is in, of those in its sequence"""
        self.depths = torch.tensor([depth for _, tree in self._trees for depth in tree.depths], device=device)
        """(N,): the number of tokens before each node"""
        self._sees = [tree.find_ancestors() for _, tree in self._trees]

    def __len__(self) -> int:
        return self._count

    def embed(self) -> Tensor:
        tokens = [token for _, tree in self._trees for token in tree.tokens]
        return self.encoder.embed(torch.tensor([tokens], device=self.encoder.device))[0]

    def attend(self, number: int, block: Block, states: Tensor) -> Tensor:
        stream = torch.empty_like(states)
        for (nodes, _), sees in zip(self._trees, self._sees, strict=True):
            own = states[nodes][None]  # (1, nodes, d)
            # What attention adds to its scores: nothing for a node's ancestors and itself, else the least number.
            mask = torch.zeros(sees.shape, dtype=states.dtype, device=states.device)
            mask.masked_fill_(~sees.to(states.device), torch.finfo(states.dtype).min)
            context = self._decoder.build_contexts(own, mask=mask[None, None], positions=self.depths[nodes][None])[
                number
            ]
            stream[nodes] = block.attend(own, context)[0]
        return stream


def _pack(prefixes: Sequence[tuple[int, ...]]) -> Iterable[list[tuple[int, ...]]]:
    """Divide prefixes, in order, so that the tree of each part has at most `_PACK_NODES` nodes, or one prefix."""
    pack: list[tuple[int, ...]] = []
    nodes: set[tuple[int, ...]] = set()
    for prefix in prefixes:
        own = {prefix[: depth + 1] for depth in range(len(prefix))}
        if pack and len(nodes | own) > _PACK_NODES:
            yield pack
            pack, nodes = [], set()
        pack.append(prefix)
        nodes |= own
    yield pack


class WholePrompts(Nodes):
    """Whole prompts in a bidirectional encoder, with the padding that it reads: a node is a position of one prompt."""

    def __init__(self, encoder: TextEncoder, groups: Sequence[Sequence[Site]]) -> None:
        sites = [site for group in groups for site in group]
        prompts = list(dict.fromkeys(ids for ids, _ in sites))
        padded = encoder.pad(prompts, full_length=False)
        self._ids, self._mask = padded.ids, padded.mask  # (p, s)
        rows = {ids: row for row, ids in enumerate(prompts)}
        length = padded.ids.shape[1]
        super().__init__(encoder, groups, last=[rows[ids] * length + index for ids, index in sites])

    def __len__(self) -> int:
        return self._ids.numel()

    def embed(self) -> Tensor:
        return self.encoder.embed(self._ids).flatten(0, 1)

    def attend(self, number: int, block: Block, states: Tensor) -> Tensor:
        length = self._ids.shape[1]
        step = max(1, _PATH_ROWS // length)
        for start in range(0, len(self._ids), step):
            mask = self._mask[start : start + step]
            nodes = slice(start * length, (start + len(mask)) * length)
            own = states[nodes].unflatten(0, (len(mask), length))  # (p, s, d)
            states[nodes] = block.attend(own, self.encoder.build_contexts(own, mask=mask)[number]).flatten(0, 1)
        return states


def build_nodes(encoder: TextEncoder, groups: Sequence[Sequence[Site]]) -> Nodes:
    """Return the nodes of the prompts of these sites, in the form that suits the encoder's attention."""
    if isinstance(encoder, ClipEncoder):
        return PrefixTree(encoder, groups)
    return PackedTrees(encoder, groups) if isinstance(encoder, DecoderEncoder) else WholePrompts(encoder, groups)
