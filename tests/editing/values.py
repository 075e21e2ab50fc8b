"""Shortcuts for values in tests."""

from torch import Tensor

from editing.values import EditValue, EncoderValue


def first(value: EditValue) -> EncoderValue:
    """Return the value in the first text encoder."""
    return next(iter(value.encoders.values()))


def one_encoder(encoder: str, layer: int, delta: Tensor, hidden: Tensor) -> EditValue:
    """Return a value in one text encoder."""
    return EditValue({encoder: EncoderValue(layer, delta, hidden)})
