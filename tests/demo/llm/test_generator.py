import pytest
import torch
from diffusers import ZImageTransformer2DModel

from demo.llm.generator import FixedSizeZImage
from editing.condition import Condition
from editing.generators.z_image import ZImage
from tests.demo.llm.conftest import WIDTH


def make(kind: type[ZImage], transformer: ZImageTransformer2DModel) -> ZImage:
    return kind(transformer.requires_grad_(False), None, None, image_size=(32, 32), index={})


@pytest.mark.parametrize("lengths", [(9, 12), (12, 12)])
def test_predictions_and_gradients_equal_those_of_the_engines_generator(
    transformer: ZImageTransformer2DModel, lengths: tuple[int, ...]
) -> None:
    chance = torch.Generator().manual_seed(0)
    states = torch.randn(2, 12, WIDTH, generator=chance).requires_grad_()
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    condition = Condition(states, None if mask.all() else mask)
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=chance), torch.tensor([250.0, 750.0])  # exact thousandths
    expected, found = (
        make(kind, transformer).predict(noisy, timesteps, condition) for kind in (ZImage, FixedSizeZImage)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(own.square().sum(), states)[0] for own in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_captions_that_are_too_long_are_refused(transformer: ZImageTransformer2DModel) -> None:
    with pytest.raises(ValueError, match="40 tokens; at most 32"):
        make(FixedSizeZImage, transformer).predict(
            torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), Condition(torch.zeros(1, 40, WIDTH))
        )
