"""Edits that pull at one memory. What their words alone show is found here, free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from editing.edits import Balance, Destination, DestinationPrompt, Erasure


@dataclass(frozen=True)
class Conflict:
    """Two edits, by their position in the call, that pull at one memory."""

    kind: Literal["same source", "source is a destination", "same key"]
    edits: tuple[int, int]
    """For "source is a destination": the edit of that source, then the one of that destination."""
    cosine: float | None = None
    """For "same key": the smallest cosine of their keys over the edited layers."""

    def as_json(self, ids: Sequence[str]) -> dict[str, Any]:
        """Return the fields, with the id of each edit for its position."""
        return {"kind": self.kind, "edits": [ids[position] for position in self.edits], "cosine": self.cosine}


def normalize_source(text: str) -> str:
    """Equal for sources that the tokenizer reads alike: case and the number of spaces do not count."""
    return " ".join(text.casefold().split())


def list_destination_names(destination: Destination) -> tuple[str, ...]:
    """The concepts that a destination names; none for reference images or an erasure to nothing."""
    match destination:
        case DestinationPrompt(name) | Erasure(name):
            return (name,) if name else ()
        case Balance(weights):
            return tuple(weights)
        case _:
            return ()


def find_declared_conflicts(sources: Sequence[str], destinations: Sequence[Sequence[str]]) -> tuple[Conflict, ...]:
    """Two edits of one source, and a source that is another edit's destination; `destinations`: the names in each."""
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
