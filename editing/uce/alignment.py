"""Which states of a source prompt stand beside which of its destination's, position by position.

From the last subject token to the end of the padded sequence: attention is causal, so the last subject token is the
first to know the whole subject, and the words after it, end-of-text and padding, all of which the U-Net reads, know it
as well. Each prompt is aligned at *its* last subject token.

Shapes: s positions, t of them that are compared, d width of the states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editing.edits import ConceptEdit, ReferenceImages, fill_template, split_template
from editing.errors import InvalidEdit
from editing.prompts import PromptTokenizer, build_destination_prompts
from editing.stage_two.conflicts import list_destination_names


@dataclass(frozen=True)
class AlignedPrompts:
    """One template, filled with the source and with everything that its destination is a mixture of."""

    source: str
    destinations: tuple[str, ...]
    shares: tuple[float, ...]
    """Of the destinations, summing to one."""
    starts: tuple[int, ...]
    """The position of the last subject token: of the source, then of each destination. Where an erasure leaves no
    subject, that of the token before its place."""

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.source, *self.destinations

    def of_source(self, states: Tensor) -> Tensor:
        """(s, d) of the source prompt to (t, d)."""
        return self._cut(states, self.starts[0])

    def of_destination(self, states: Sequence[Tensor]) -> Tensor:
        """(s, d) of each destination prompt to their weighted mean, (t, d)."""
        cut = (self._cut(own, start) for own, start in zip(states, self.starts[1:], strict=True))
        return torch.stack([share * own for share, own in zip(self.shares, cut, strict=True)]).sum(0)

    def _cut(self, states: Tensor, start: int) -> Tensor:
        return states[start : start + len(states) - max(self.starts)]


def align_prompts(edit: ConceptEdit, tokenizer: PromptTokenizer, *, pointer: str = "") -> list[AlignedPrompts]:
    """Those of each template. Raises `InvalidEdit` for reference images, which have no words, and `InvalidPrompt`;
    `pointer` is where the edit is."""
    if isinstance(edit.destination, ReferenceImages):
        raise InvalidEdit(
            "reference images have no words to read: name the destination, or use the method that edits the memory",
            pointer=f"{pointer}/destination",
        )
    names = edit.source, *(list_destination_names(edit.destination) or ("",))
    aligned = []
    for number, template in enumerate(edit.templates):
        prompts = build_destination_prompts(edit.destination, template)
        at = f"{pointer}/templates/{number}"
        starts = tuple(_last_index(tokenizer, template, name, pointer=at) for name in names)
        aligned.append(
            AlignedPrompts(fill_template(template, edit.source), tuple(prompts), tuple(prompts.values()), starts)
        )
    return aligned


def _last_index(tokenizer: PromptTokenizer, template: str, name: str, *, pointer: str) -> int:
    """The position of the name's last token; of no name, that of the token before its place."""
    if name.strip():
        return tokenizer.locate(template, name, pointer=pointer).last_subject_index
    before, _ = split_template(template)
    return tokenizer.encode(before, pointer=pointer).eos_index - 1
