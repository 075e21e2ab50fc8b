"""Generators on a GPU: bfloat16 weights, and as many latents at a time as fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editing.chunks import ChunkSize, CudaMemory
from editing.condition import Condition
from editing.generators.flux import Flux
from editing.generators.generator import Generator
from editing.generators.load import load_generator
from tests.generators import FAMILIES
from tests.pipelines import WIDTH, write_pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
BUDGET = 2**26  # bytes
any_family = pytest.mark.parametrize("name", FAMILIES)


class LimitedMemory(CudaMemory):
    """A GPU with little free memory."""

    def measure_free(self) -> int:
        return BUDGET


@any_family
def test_prediction_agrees_with_the_cpu(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.write(tmp_path)
    condition = family.draw_condition(seed=1, prompts=2)
    predictions = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        generator = load_generator(folder, device=torch.device(device), dtype=dtype, autoencoder_dtype=torch.float32)
        noisy = torch.randn(2, *generator.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
        t = torch.tensor([500.0, 250.0], device=device)  # bfloat16 holds a thousandth of them exactly
        if isinstance(generator, Flux):
            generator.embedded_guidance = 2.0  # and a thousand times this
        predicted = generator.predict_in_chunks(noisy, t, condition.map(lambda tensor: tensor.to(device)))  # noqa: B023
        predictions.append(predicted.cpu())
    exact, same, rounded = predictions
    torch.testing.assert_close(same, exact, rtol=1e-2, atol=1e-2)  # TF32 may be on
    assert float((rounded - exact).norm()) < 0.1 * float(exact.norm())


@any_family
def test_chunks_are_measured_with_gradients(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    generator = load(family.write(tmp_path))
    run, states = differentiate(generator, family.draw_condition(seed=1), rows=8)
    gradients = generator.chunks.run_in_chunks(8, run)
    assert len(gradients) == 3  # trials of one and three rows, then all others
    assert 3 < generator.chunks.size <= 256
    assert all(gradient.shape == states.shape and bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "z_image"])
@pytest.mark.parametrize("saves_memory", [False, True])
def test_as_many_latents_run_at_a_time_as_fit(name: str, saves_memory: bool, tmp_path: Path) -> None:
    if name == "unet":
        generator = load(write_pipeline(tmp_path))
        condition = Condition(torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(1)))
        generator.image_size = (128, 128)
    else:
        generator = load(FAMILIES[name].write(tmp_path))
        condition = FAMILIES[name].draw_condition(seed=1)
        generator.image_size = (32, 32) if name == "sd3" else (128, 128)  # the most that their positions allow
    if saves_memory:
        assert generator.enable_checkpointing()
    gauge = LimitedMemory(DEVICE)
    generator.chunks = ChunkSize(gauge=gauge)
    rows = 200
    run, _ = differentiate(generator, condition, rows=rows)
    run(slice(0, 1))  # libraries take their workspace at the first call
    generator.chunks.run_in_chunks(4, run)
    size = generator.chunks.size
    assert 3 < size
    gauge.reset()
    run(slice(0, min(size, rows)))
    peak = gauge.measure_peak()
    assert peak < BUDGET
    assert size >= rows or peak > BUDGET / 2, (name, size, peak)


def load(folder: Path) -> Generator:
    return load_generator(folder, device=DEVICE, dtype=torch.bfloat16, autoencoder_dtype=torch.float32)


def differentiate(generator: Generator, condition: Condition, *, rows: int) -> tuple[Callable[[slice], Tensor], Tensor]:
    """Return a function that differentiates the predictions of some latents, and what by."""
    noisy = torch.randn(rows, *generator.latent_shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    t = torch.full((rows,), 500.0, device=DEVICE)
    condition = condition.map(lambda tensor: tensor.to(DEVICE))
    states = condition.states.requires_grad_()

    def run(chunk: slice) -> Tensor:
        own = condition.map(lambda tensor: tensor.expand(chunk.stop - chunk.start, *tensor.shape[1:]))
        loss = generator.predict(noisy[chunk], t[chunk], own).square().sum()
        (gradient,) = torch.autograd.grad(loss, states)
        return gradient

    return run, states
