"""What a generator is conditioned on.

Shapes: p prompts, s positions, D width of the states that the generator reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a generator is conditioned on, for p prompts: the output of the pipeline's `encode_prompt`."""

    states: Tensor
    """(p, s, D): what attention reads. Encoders stand side by side or one after the other, as the family has them."""
    mask: Tensor | None = None
    """(p, s) bool: the positions that attention reads. None: all."""
    pooled: Tensor | None = None
    """(p, ·): the pooled output of the whole prompt, if the generator takes one."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are present."""
        present = (getattr(self, field.name) for field in fields(self))
        return tuple(tensor for tensor in present if tensor is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply a function to each tensor."""

        def change_present(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Condition(change(self.states), change_present(self.mask), change_present(self.pooled))

    def __getitem__(self, prompts: Tensor | slice) -> "Condition":
        return self.map(lambda tensor: tensor[prompts])

    @classmethod
    def concatenate(cls, conditions: Sequence["Condition"]) -> "Condition":
        """Join conditions of equal shapes but for the number of prompts, in order."""
        joined: dict[str, Tensor | None] = {}
        for field in fields(cls):
            parts = [getattr(condition, field.name) for condition in conditions]
            joined[field.name] = None if parts[0] is None else torch.cat(parts)
        return cls(**joined)  # type: ignore[arg-type]  # `states` is always present

    def dot(self, other: "Condition") -> Tensor:
        """Return the inner product of states and pooled output with another condition's, a float32 scalar."""
        product = (self.states.float() * other.states).sum()
        if self.pooled is not None and other.pooled is not None:
            product = product + (self.pooled.float() * other.pooled).sum()
        return product
