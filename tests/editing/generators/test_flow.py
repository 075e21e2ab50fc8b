"""The noise of flow matching: x_t, its target, and σ as the scheduler shifts it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from editing.errors import UnsupportedPipeline
from editing.generators.flow import FlowTransformer, build_flow_scheduler
from editing.generators.load import load_generator
from tests.generators import FAMILIES

FLOW = [name for name in FAMILIES if not name.startswith("pixart")]


@pytest.fixture(scope="module", params=FLOW)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FlowTransformer:
    folder = FAMILIES[request.param].write(tmp_path_factory.mktemp("tiny"))
    loaded = load_generator(folder, device=torch.device("cpu"), dtype=torch.float32, autoencoder_dtype=torch.float32)
    assert isinstance(loaded, FlowTransformer)
    return loaded


def draw_latents(generator: FlowTransformer, *, count: int) -> Tensor:
    return torch.randn(count, *generator.latent_shape, generator=Generator().manual_seed(0))


def test_target_leads_from_latents_to_noise(generator: FlowTransformer) -> None:
    latents = draw_latents(generator, count=5)
    noised = generator.add_noise(latents, generator=Generator().manual_seed(1))
    sigmas = (noised.timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.noisy - sigmas * noised.target, latents, rtol=1e-4, atol=1e-5)
    noise = noised.noisy + (1 - sigmas) * noised.target  # ε
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    assert float((noise * latents).mean()) == pytest.approx(0, abs=0.1)


def test_sigmas_are_shifted_as_the_scheduler_shifts_them(generator: FlowTransformer) -> None:
    scheduler = type(generator.scheduler).from_config(generator.scheduler.config)
    if scheduler.config.get("flow_shift"):  # its σ: from 0.999 to 0, without the last
        scheduler.set_timesteps(3)
        plain = torch.linspace(0.999, 0, 4)[:3]
    else:
        plain = torch.tensor([1.0, 0.6, 0.3])
        scheduler.register_to_config(shift_terminal=None)
        scheduler.set_timesteps(sigmas=plain.tolist(), mu=generator.compute_mu())
    torch.testing.assert_close(generator.shift_sigmas(plain), scheduler.sigmas[:3], rtol=1e-4, atol=1e-5)


def test_times_are_drawn_from_the_whole_schedule(generator: FlowTransformer) -> None:
    latents = torch.zeros(4000, 1, 1, 1)
    noised = generator.add_noise(latents, generator=Generator().manual_seed(0))
    uniform = torch.linspace(0, 1, 4001)[1:]
    expected = generator.shift_sigmas(uniform) * 1000
    assert float(noised.timesteps.min()) > 0
    assert float(noised.timesteps.max()) <= 1000
    assert float(noised.timesteps.mean()) == pytest.approx(float(expected.mean()), rel=0.03)


def test_same_seed_gives_the_same_noise(generator: FlowTransformer) -> None:
    latents = draw_latents(generator, count=2)
    one, same, other = (generator.add_noise(latents, generator=Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.noisy, same.noisy)
    assert not torch.equal(one.noisy, other.noisy)


def test_dynamic_shift_grows_with_the_picture(tmp_path: Path) -> None:
    """As diffusers computes it: from 4 tokens at μ = 0.5 to 64 at μ = 1.15."""
    generator = load_generator(
        FAMILIES["flux"].write(tmp_path),
        device=torch.device("cpu"),
        dtype=torch.float32,
        autoencoder_dtype=torch.float32,
    )
    assert isinstance(generator, FlowTransformer)
    assert generator.compute_mu() == pytest.approx(0.5 + 0.65 * (16 - 4) / 60)
    generator.image_size = (32, 32)
    assert generator.compute_mu() == pytest.approx(1.15)
    shifted = float(generator.shift_sigmas(torch.tensor([0.5])))
    assert shifted == pytest.approx(math.exp(1.15) / (math.exp(1.15) + 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler"},
            "EulerDiscreteScheduler cannot be used for flow matching: ",
        ),
        ({}, "None cannot be used"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "not set to flow prediction"),
    ],
)
def test_schedulers_of_another_kind_are_refused(config: dict[str, str], message: str) -> None:
    with pytest.raises(UnsupportedPipeline, match=message):
        build_flow_scheduler(config)
