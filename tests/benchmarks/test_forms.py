"""How the share of the way is computed."""

import pytest
import torch

from benchmarks.forms import compute_share


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_share_is_the_part_of_the_way_that_was_gone(share: float) -> None:
    before, wanted = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    aside = torch.tensor([[0.0, 7, 0], [0, 0, 7]])  # a move beside the way does not count
    assert compute_share(before, before + share * wanted + aside, wanted) == pytest.approx(share)
