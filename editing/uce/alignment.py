"""Align the states of a source prompt with those of its destination prompts, position by position.

The aligned states reach from the last subject token to the end of what the generator reads of the prompt. The last
subject token is the first that knows the whole subject where attention is causal. All positions after it know it too,
end-of-text and, where the generator reads it, padding included. Each prompt is aligned at *its* last subject token, in
each text encoder whose states the generator reads.

Shapes: p prompts, s positions, t aligned positions, d width of the states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editing.edits import ConceptEdit, ReferenceImages, fill_template
from editing.encoders.base import TextEncoder
from editing.errors import InvalidEdit
from editing.families.conditions import Origins
from editing.prompts import build_destination_prompts
from editing.stage_two.conflicts import list_destination_names


@dataclass(frozen=True)
class AlignedPrompts:
    """One template, filled with the source and with each prompt of the destination."""

    source: str
    destinations: tuple[str, ...]
    shares: tuple[float, ...]
    """Of the destinations, summing to one."""
    starts: tuple[tuple[int, ...], ...]
    """For each encoder the position of the last subject token: of the source, then of each destination. An erasure to
    nothing has no subject: its start is the token before the placeholder."""

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.source, *self.destinations

    def find_positions(self, origins: Origins) -> list[Tensor]:
        """Return the aligned positions of each prompt, (t,) each: as many as the prompt has that has fewest.

        `origins` are those of all prompts.
        """
        aligned: list[list[Tensor]] = [[] for _ in self.prompts]
        for number, starts in enumerate(self.starts):
            shown = (origins.encoder == number) & (origins.position >= torch.tensor(starts)[:, None])  # (p, s)
            shortest = int(shown.sum(1).min())
            for own, row in zip(aligned, shown, strict=True):
                own.append(row.nonzero().flatten()[:shortest])
        return [torch.cat(own) for own in aligned]

    def average_destinations(self, states: Sequence[Tensor]) -> Tensor:
        """Return the weighted mean of the destination prompts' aligned states, (t, d) each."""
        return torch.stack([share * own for share, own in zip(self.shares, states, strict=True)]).sum(0)


def align_prompts(edit: ConceptEdit, encoders: Sequence[TextEncoder], *, pointer: str = "") -> list[AlignedPrompts]:
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
        own = f"{pointer}/templates/{number}"
        starts = tuple(
            tuple(encoder.tokenizer.find_last_token(template, name, pointer=own) for name in names)
            for encoder in encoders
        )
        source = fill_template(template, edit.source)
        aligned.append(AlignedPrompts(source, tuple(prompts), tuple(prompts.values()), starts))
    return aligned
