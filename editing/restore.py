"""Restore weights after a temporary change."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def restore_weights(weights: Iterable[Tensor]) -> Iterator[None]:
    """Restore these weights on exit, bit for bit, also after an error."""
    saved = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)
