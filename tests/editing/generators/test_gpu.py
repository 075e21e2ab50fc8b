"""Generators on a GPU: bfloat16 weights, and as many latents at a time as fit."""

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from editing.generators.flux import Flux
from editing.generators.load import load_generator
from tests.generators import FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("name", FAMILIES),
]


def test_prediction_agrees_with_the_cpu(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.write(tmp_path)
    condition = family.draw_condition(seed=1, prompts=2)
    predictions = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        generator = load_generator(folder, device=torch.device(device), dtype=dtype, autoencoder_dtype=torch.float32)
        noisy = torch.randn(2, *generator.latent_shape, generator=Generator().manual_seed(0)).to(device)
        t = torch.tensor([500.0, 250.0], device=device)  # bfloat16 holds a thousandth of them exactly
        if isinstance(generator, Flux):
            generator.embedded_guidance = 2.0  # and a thousand times this
        predicted = generator.predict_in_chunks(noisy, t, condition.map(lambda tensor: tensor.to(device)))  # noqa: B023
        predictions.append(predicted.cpu())
    exact, same, rounded = predictions
    torch.testing.assert_close(same, exact, rtol=1e-2, atol=1e-2)  # TF32 may be on
    assert float((rounded - exact).norm()) < 0.1 * float(exact.norm())


def test_chunks_are_measured_with_gradients(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    device = torch.device("cuda")
    generator = load_generator(
        family.write(tmp_path), device=device, dtype=torch.bfloat16, autoencoder_dtype=torch.float32
    )
    condition = family.draw_condition(seed=1).map(lambda tensor: tensor.to(device))
    noisy = torch.randn(8, *generator.latent_shape, generator=Generator().manual_seed(0)).to(device)
    t = torch.full((8,), 500.0, device=device)
    states = condition.states.requires_grad_()

    def differentiate(chunk: slice) -> Tensor:
        rows = condition.map(lambda tensor: tensor.expand(chunk.stop - chunk.start, *tensor.shape[1:]))
        loss = generator.predict(noisy[chunk], t[chunk], rows).square().sum()
        (gradient,) = torch.autograd.grad(loss, states)
        return gradient

    gradients = generator.chunks.run_in_chunks(8, differentiate)
    assert len(gradients) == 3  # trials of one and three rows, then all others
    assert 3 < generator.chunks.size <= 256
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
