"""Align the states of a source prompt with those of its destination prompts, position by position.

The aligned states reach from the last subject token to the end of the padded sequence. Attention is causal: the last
subject token is the first that knows the whole subject, and all positions after it, end-of-text and padding included,
know it too and are read by the U-Net. Each prompt is aligned at *its* last subject token.

Shapes: s positions, t aligned positions, d width of the states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editing.edits import ConceptEdit, ReferenceImages, fill_template
from editing.errors import InvalidEdit
from editing.prompts import PromptTokenizer, build_destination_prompts
from editing.stage_two.conflicts import list_destination_names


@dataclass(frozen=True)
class AlignedPrompts:
    """One template, filled with the source and with each prompt of the destination."""

    source: str
    destinations: tuple[str, ...]
    shares: tuple[float, ...]
    """Of the destinations, summing to one."""
    starts: tuple[int, ...]
    """The position of the last subject token: of the source, then of each destination. An erasure to nothing has no
    subject: its start is the token before the placeholder."""

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.source, *self.destinations

    def select_source_states(self, states: Tensor) -> Tensor:
        """Return the aligned states of the source prompt, (s, d) to (t, d)."""
        return self._cut(states, self.starts[0])

    def average_destination_states(self, states: Sequence[Tensor]) -> Tensor:
        """Return the weighted mean of the destination prompts' aligned states, (s, d) each to (t, d)."""
        aligned = (self._cut(own, start) for own, start in zip(states, self.starts[1:], strict=True))
        return torch.stack([share * own for share, own in zip(self.shares, aligned, strict=True)]).sum(0)

    def _cut(self, states: Tensor, start: int) -> Tensor:
        """Cut all prompts to the same number of positions t: that of the one whose subject ends last."""
        return states[start : start + len(states) - max(self.starts)]


def align_prompts(edit: ConceptEdit, tokenizer: PromptTokenizer, *, pointer: str = "") -> list[AlignedPrompts]:
    """Return the aligned prompts of each template.

    Raises `InvalidEdit` for reference images and `InvalidPrompt`; `pointer` is that of the edit.
    """
    if isinstance(edit.destination, ReferenceImages):
        raise InvalidEdit(
            "reference images have no prompt: name the destination, or use the method that edits the text encoder",
            pointer=f"{pointer}/destination",
        )
    names = edit.source, *(list_destination_names(edit.destination) or ("",))
    aligned = []
    for number, template in enumerate(edit.templates):
        prompts = build_destination_prompts(edit.destination, template)
        starts = tuple(
            tokenizer.find_last_token(template, name, pointer=f"{pointer}/templates/{number}") for name in names
        )
        source = fill_template(template, edit.source)
        aligned.append(AlignedPrompts(source, tuple(prompts), tuple(prompts.values()), starts))
    return aligned
