"""The value of an edit: what stage I optimizes, what the service stores, and what stage II writes.

Shapes: d width of a text encoder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from editing import ENGINE_VERSION
from editing.errors import EditingError

_METADATA = "edit_value"


@dataclass(frozen=True, eq=False)
class EncoderValue:
    """The value in one text encoder: the state after `layer` shall become `hidden + delta`."""

    layer: int
    """L"""
    delta: Tensor
    """δ (d,) float32, on the CPU"""
    hidden: Tensor
    """h (d,) float32: the state before any edit, the mean over the templates"""

    @property
    def delta_norm(self) -> float:
        return float(self.delta.norm())

    @property
    def hidden_norm(self) -> float:
        return float(self.hidden.norm())


@dataclass(frozen=True, eq=False)
class EditValue:
    """The value of one edit in every text encoder of its pipeline."""

    encoders: Mapping[str, EncoderValue]
    """By the encoder's name, in the pipeline's order."""
    text_losses: tuple[float, ...] = ()
    """L_txt before each step; empty if the objective has none. The encoders share one loss."""
    noise_losses: tuple[float, ...] = ()
    """L_noise before each step that used it."""
    engine_version: str = ENGINE_VERSION
    attributes: tuple["EditValue", ...] = ()
    """Of a balance: the value of each of its prompts, in order. `mix` weighs them again. They are not stored."""

    def to_safetensors(self) -> bytes:
        """Write the vectors as one safetensors file: `<encoder>.delta` and `<encoder>.hidden`.

        The metadata is one JSON string with the layers and the engine version: safetensors writes several metadata
        keys in random order. Equal values give equal bytes.
        """
        tensors: dict[str, Tensor] = {}
        for name, value in self.encoders.items():
            tensors |= {f"{name}.delta": value.delta, f"{name}.hidden": value.hidden}
        facts = {
            "engine_version": self.engine_version,
            "layers": {name: value.layer for name, value in self.encoders.items()},
        }
        return save(tensors, metadata={_METADATA: json.dumps(facts)})

    @classmethod
    def from_safetensors(cls, content: bytes) -> Self:
        """Read what `to_safetensors` wrote. Raises `EditingError` for anything else."""
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            facts = json.loads(header["__metadata__"][_METADATA])
            tensors = load(content)
            encoders = {
                name: EncoderValue(int(layer), tensors[f"{name}.delta"], tensors[f"{name}.hidden"])
                for name, layer in facts["layers"].items()
            }
            return cls(encoders, engine_version=facts["engine_version"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EditingError(f"the bytes hold no value of an edit: {error}") from error


def mix(values: Sequence[EditValue], shares: Sequence[float]) -> EditValue:
    """Return the weighted mean v = Σ F_a v_a of one source's values towards several prompts.

    `shares` are the F_a, which sum to one. The losses are weighted alike. Raises `EditingError` if the values are of
    different sources or layers.
    """
    first = values[0]
    for other in values:
        if other.encoders.keys() != first.encoders.keys() or not all(
            own.layer == other.encoders[name].layer and own.hidden.equal(other.encoders[name].hidden)
            for name, own in first.encoders.items()
        ):
            raise EditingError("only values of one source at one layer can be mixed")
    encoders = {}
    for name, own in first.encoders.items():
        # h is the same in all, so that Σ F_a (h + δ_a) = h + Σ F_a δ_a
        deltas = [share * value.encoders[name].delta for value, share in zip(values, shares, strict=True)]
        encoders[name] = replace(own, delta=torch.stack(deltas).sum(0))  # (d,)
    return EditValue(
        encoders,
        text_losses=weigh_losses([value.text_losses for value in values], shares),
        noise_losses=weigh_losses([value.noise_losses for value in values], shares),
        engine_version=first.engine_version,
        attributes=tuple(values),
    )


def weigh_losses(losses: Sequence[Sequence[float]], shares: Sequence[float]) -> tuple[float, ...]:
    """Return the weighted mean of several losses at each step."""
    return tuple(
        sum(loss * share for loss, share in zip(step, shares, strict=True)) for step in zip(*losses, strict=True)
    )
