"""Text encoders that can be run block by block, with access to the keys of their output matrices.

An output matrix ends a block's MLP: it maps a key to a value. `Block` and `TextEncoder` are all that the two stages
know of an encoder.

Shapes: p prompts, s positions, d width, m width of the keys.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from editing.families.family import EncoderSpec, Tap
from editing.families.layout import choose_default_layers, count_blocks, find_last_value_layer, find_value_layer
from editing.families.registry import FAMILIES
from editing.prompts import PromptTokenizer

Context = Mapping[str, Any]
"""What a block's attention takes besides the states: masks and positions."""


@dataclass(frozen=True)
class Encoding:
    """The output of a text encoder for p prompts."""

    taps: tuple[Tensor, ...]
    """(p, s, d) each: what the generator reads, at every position."""
    mask: Tensor
    """(p, s) bool: where the prompts' tokens are, and not the padding."""
    pooled: Tensor | None = None
    """(p, ·): what a CLIP encoder gives for the whole prompt. This is E_eos of Eq. 2."""

    @property
    def states(self) -> Tensor:
        """The taps side by side, (p, s, ·)."""
        return self.taps[0] if len(self.taps) == 1 else torch.cat(self.taps, dim=-1)


@dataclass(frozen=True)
class PaddedPrompts:
    """Token ids of prompts in one tensor."""

    ids: Tensor
    """(p, s)"""
    mask: Tensor
    """(p, s) bool: where the prompts' tokens are, and not the padding."""
    starts: Tensor
    """(p,): the positions of the prompts' first tokens; above 0 where the padding is at the left."""

    @property
    def ends(self) -> Tensor:
        """(p,): the positions of the prompts' last tokens."""
        return self.starts + self.mask.sum(1) - 1


@dataclass(frozen=True)
class SharedPrefix:
    """The first tokens of all prompts in a causal encoder, run once: some families put a long text before each."""

    encoding: Encoding
    """What the generator reads at them, of one prompt."""
    contexts: Sequence[Context]
    """What lets each block's attention see them."""

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.encoding.mask.shape[1]

    def prepend_to(self, encoding: Encoding) -> Encoding:
        """Put them before what p prompts give without them."""
        p = len(encoding.mask)
        taps = (
            torch.cat([own.expand(p, -1, -1), tap], dim=1)
            for own, tap in zip(self.encoding.taps, encoding.taps, strict=True)
        )
        return Encoding(tuple(taps), torch.cat([self.encoding.mask.expand(p, -1), encoding.mask], dim=1))


class Block(ABC):
    """One block of a text encoder.

    `attend` gives the residual stream after attention, `keys` what the output matrix reads of it, and `add` the states
    after the block, from the stream and the matrix's output.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        """The library's module."""

    @property
    @abstractmethod
    def output_matrix(self) -> nn.Linear:
        """The matrix that an edit changes, (d, m)."""

    @abstractmethod
    def attend(self, states: Tensor, context: Context) -> Tensor:
        """Return the residual stream after attention, (p, s, d), of the states before the block."""

    @abstractmethod
    def keys(self, stream: Tensor) -> Tensor:
        """Return the keys (…, m) of the stream (…, d)."""

    def add(self, stream: Tensor, output: Tensor) -> Tensor:
        """Return the states after the block from the stream and the matrix's output, (…, d) each."""
        return stream + output

    def pull_back(self, output: Tensor, change: Tensor) -> Tensor:  # noqa: ARG002
        """Return the change of the matrix's output (…, d) that changes the block's output by `change` (…, d)."""
        return change

    def run_mlp(self, stream: Tensor) -> Tensor:
        """Return the states after the block, (…, d), of the stream (…, d)."""
        return self.add(stream, self.output_matrix(self.keys(stream)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the attention. The output matrix of T5 may be in another."""
        parameter: nn.Parameter = next(self.layer.parameters())
        return parameter.dtype

    def copy(self, dtype: torch.dtype) -> Self:
        """Copy the block in another dtype."""
        twin = copy.copy(self)
        twin.layer = copy.deepcopy(self.layer).to(dtype)
        return twin


class TextEncoder(ABC):
    """A text encoder that can start and stop at any block."""

    is_causal: bool
    """Whether a token's states depend only on the tokens before it."""
    embeddings: nn.Module
    final_norm: nn.Module
    key: str
    """The key of an output matrix in the component's files without its beginning, with `{}` for the layer."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PromptTokenizer,
        *,
        name: str = "text_encoder",
        folder: Path | None = None,
        family: str = "sd1",
        negative_tokenizer: PromptTokenizer | None = None,
        n_layers: int | None = None,
    ) -> None:
        """`folder` has the component's weights. An export needs it.

        `n_layers` is the number of blocks of the whole encoder, if the model has only the first of them.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.negative_tokenizer = negative_tokenizer or tokenizer
        """Of negative prompts in classifier-free guidance."""
        self.name = name
        self.folder = folder
        self.family = family
        self.spec: EncoderSpec = FAMILIES[family].find_encoder(name)
        self.blocks: Sequence[Block] = self._find_blocks()
        self.n_layers = n_layers or len(self.blocks)
        matrix = self.output_matrix(0)
        self.width: int = matrix.out_features
        """d"""
        self.mlp_width: int = matrix.in_features
        """m"""

    @abstractmethod
    def _find_blocks(self) -> Sequence[Block]:
        """Find the modules by structure. Raises `UnsupportedPipeline`."""

    def embed(self, ids: Tensor) -> Tensor:
        """Return the states before block 0, (p, s, d), of token ids (p, s)."""
        states: Tensor = self.embeddings(ids)
        return states.to(self.dtype)

    def normalize(self, states: Tensor) -> Tensor:
        """Apply the final norm, (p, s, d) to (p, s, d)."""
        normed: Tensor = self.final_norm(states)
        return normed

    @abstractmethod
    def build_contexts(
        self, states: Tensor, *, mask: Tensor | None = None, prefix: SharedPrefix | None = None
    ) -> Sequence[Context]:
        """Return the context of each block for states of this shape, dtype and device, as inference has it.

        `mask` (p, s) says where the prompts' tokens are. It counts only if attention leaves out the padding. With a
        prefix, the states are those of the tokens after it.
        """

    def run_prefix(self, states: Tensor, *, start: int) -> SharedPrefix | None:  # noqa: ARG002
        """Run the first tokens of all prompts from block `start` on, if it pays.

        Takes the states (p, s, d) before that block of prompts without padding at the left.
        """
        return None

    def pool(self, normed: Tensor, ends: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return the pooled output (p, ·) from the states after the final norm, if the encoder has one."""
        return None

    @property
    def value_layer(self) -> int:
        """L, the last layer edited by default."""
        return find_value_layer(self.spec, layers=self.n_layers)

    @property
    def last_value_layer(self) -> int:
        """The last layer that values can be optimized for: the last but one, and not after what the generator reads."""
        return find_last_value_layer(self.spec, layers=self.n_layers)

    @property
    def default_edited_layers(self) -> tuple[int, ...]:
        return choose_default_layers(self.family, self.name, last=self.value_layer)

    @property
    def device(self) -> torch.device:
        return self.output_matrix(0).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def has_pooled_objective(self) -> bool:
        """Whether the text objective of stage I compares the pooled output, as the paper has it for CLIP."""
        return self.spec.kind == "clip"

    @property
    def objective_widths(self) -> tuple[int, ...]:
        """The width of each tensor that the text objective compares: the taps, or the pooled output."""
        return (self.width,) * len(self.spec.taps)

    @property
    def reads_padding(self) -> bool:
        """Whether a token's states depend on the padding."""
        return not (self.is_causal or self.spec.is_masked)

    def output_matrix(self, layer: int) -> nn.Linear:
        """Return the matrix that an edit changes: it maps keys (m,) to values (d,)."""
        return self.blocks[layer].output_matrix

    def double(self) -> Self:
        """Copy the encoder with its blocks in float64. It shares the embeddings with the original."""
        twin = copy.copy(self)
        twin.blocks = [block.copy(torch.float64) for block in self.blocks]
        twin.final_norm = copy.deepcopy(self.final_norm).double()
        return twin

    def pad(
        self, prompts: Sequence[Sequence[int]], *, full_length: bool = True, negative: bool = False
    ) -> PaddedPrompts:
        """Pad token ids to the length that inference reads, or at the right to the longest prompt.

        The length is always that of inference if a token's states depend on the padding.
        """
        tokenizer, longest = self.negative_tokenizer if negative else self.tokenizer, max(map(len, prompts))
        full = (full_length and not self.spec.pads_to_longest) or self.reads_padding
        length = tokenizer.max_length if full else longest
        at_left = full_length and tokenizer.pads_left
        starts = [length - len(prompt) if at_left else 0 for prompt in prompts]
        ids = torch.full((len(prompts), length), tokenizer.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (start, prompt) in enumerate(zip(starts, prompts, strict=True)):
            ids[row, start : start + len(prompt)] = torch.tensor(prompt, dtype=ids.dtype)
            mask[row, start : start + len(prompt)] = True
        return PaddedPrompts(ids.to(self.device), mask.to(self.device), torch.tensor(starts, device=self.device))

    def attend(self, layer: int, states: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention (p, s, d) and the keys (p, s, m)."""
        if context is None:
            context = self.build_contexts(states)[layer]
        stream = self.blocks[layer].attend(states, context)
        return stream, self.blocks[layer].keys(stream)

    def run_layers(self, states: Tensor, *, start: int, stop: int, contexts: Sequence[Context] | None = None) -> Tensor:
        """Run blocks start … stop-1 on the states before `start`, (p, s, d) to (p, s, d)."""
        if contexts is None and start < stop:
            contexts = self.build_contexts(states)
        for layer in range(start, stop):
            assert contexts is not None
            states = self.blocks[layer].run_mlp(self.blocks[layer].attend(states, contexts[layer]))
        return states

    def encode_from(
        self, states: Tensor, *, start: int, mask: Tensor, ends: Tensor, contexts: Sequence[Context] | None = None
    ) -> Encoding:
        """Run the blocks from `start` on the states (p, s, d) before it, as far as they are read.

        `mask` (p, s) says where the prompts' tokens are, and `ends` (p,) where the last ones are.
        """
        if contexts is None:
            contexts = self.build_contexts(states, mask=mask)
        done, taps = start, {}
        needs_pooled = self.spec.kind == "clip"
        counts = {self._count_blocks(tap) for tap in self.spec.taps} | ({self.n_layers} if needs_pooled else set())
        for count in sorted(counts):
            states = self.run_layers(states, start=done, stop=max(done, count), contexts=contexts)
            done = max(done, count)
            taps[count] = states
        normed = self.normalize(states) if needs_pooled or "final" in self.spec.taps else None
        read = (normed if tap == "final" else taps[self._count_blocks(tap)] for tap in self.spec.taps)
        pooled = self.pool(normed, ends) if needs_pooled and normed is not None else None
        return Encoding(tuple(tap for tap in read if tap is not None), mask, pooled)

    def encode(self, prompts: Sequence[Sequence[int]], *, full_length: bool = True, negative: bool = False) -> Encoding:
        """Encode the token ids of prompts, by default at the length that inference reads."""
        padded = self.pad(prompts, full_length=full_length, negative=negative)
        return self.encode_from(self.embed(padded.ids), start=0, mask=padded.mask, ends=padded.ends)

    def encode_texts(self, prompts: Sequence[str], *, negative: bool = False) -> Encoding:
        """Encode prompts as inference does, or negative prompts of classifier-free guidance."""
        tokenizer = self.negative_tokenizer if negative else self.tokenizer
        return self.encode([tokenizer.encode(prompt).ids for prompt in prompts], negative=negative)

    def _count_blocks(self, tap: Tap) -> int:
        """Return the number of blocks that have run at a tap."""
        return count_blocks(tap, layers=self.n_layers)
