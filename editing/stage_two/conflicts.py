"""Conflicts between edits that their texts alone show. Free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from editing.edits import Balance, Destination, DestinationPrompt, Erasure


@dataclass(frozen=True)
class Conflict:
    """Two edits that ask for different values at the same key."""

    kind: Literal["same source", "source is a destination", "same key"]
    edits: tuple[int, int]
    """Their indices in the call. For "source is a destination": the edit of that source, then the other."""
    cosine: float | None = None
    """For "same key": the smallest cosine of their keys over the edited layers."""

    def to_json(self, ids: Sequence[str]) -> dict[str, Any]:
        """Return the fields, with the id of each edit for its position."""
        return {"kind": self.kind, "edits": [ids[position] for position in self.edits], "cosine": self.cosine}


def normalize_source(text: str) -> str:
    """Return equal texts for sources that the tokenizer reads alike: case and runs of spaces do not count."""
    return " ".join(text.casefold().split())


def list_destination_names(destination: Destination) -> tuple[str, ...]:
    """Return the names in a destination; none for reference images or an erasure to nothing."""
    match destination:
        case DestinationPrompt(name) | Erasure(name):
            return (name,) if name else ()
        case Balance(weights):
            return tuple(weights)
        case _:
            return ()


def find_declared_conflicts(sources: Sequence[str], destinations: Sequence[Sequence[str]]) -> tuple[Conflict, ...]:
    """Find edits of the same source, and sources that are destinations of other edits.

    `destinations` has the names in each edit's destination.
    """
    by_source: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        by_source.setdefault(normalize_source(source), []).append(index)
    conflicts = [Conflict("same source", (first, other)) for first, *others in by_source.values() for other in others]
    conflicts += [
        Conflict("source is a destination", (other, index))
        for index, names in enumerate(destinations)
        for name in names
        for other in by_source.get(normalize_source(name), ())
        if other != index
    ]
    return tuple(conflicts)
