"""Every family's generator computes what diffusers' own pipeline computes, step by step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from editing.condition import Condition
from editing.generators import generator as interface
from editing.generators.load import load_generator
from tests.generators import FAMILIES, LENGTH, TinyFamily

STEPS = 2
MASKED = [name for name, family in FAMILIES.items() if family.has_mask and family.mask_dtype == torch.bool]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def diffusers(family: TinyFamily, folder: Path) -> Any:
    return family.load(folder)


@pytest.fixture(scope="module")
def generator(folder: Path) -> interface.Generator:
    return load_generator(folder, device=torch.device("cpu"), dtype=torch.float32, autoencoder_dtype=torch.float32)


def unpack(diffusers: Any, generator: interface.Generator, latents: Tensor) -> Tensor:
    """Unpack latents as the pipeline itself does, (b, n, …) to (b, c, h, w)."""
    if latents.ndim == 4:
        return latents
    _, height, width = generator.latent_shape
    if hasattr(diffusers, "_unpack_latents_with_ids"):
        ids = diffusers._prepare_latent_ids(torch.zeros(len(latents), 1, height, width))
        unpacked: Tensor = diffusers._unpack_latents_with_ids(latents, ids, height, width)
        return unpacked
    unpacked = diffusers._unpack_latents(latents, *generator.image_size, diffusers.vae_scale_factor)
    return unpacked[:, :, 0] if unpacked.ndim == 5 else unpacked


def record_steps(diffusers: Any, run: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the prediction, t and x_t that the scheduler gets in each step."""
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    step = diffusers.scheduler.step

    def record(prediction: Tensor, t: Tensor, latents: Tensor, **options: Any) -> Any:
        steps.append((prediction.clone(), t, latents.clone()))
        return step(prediction, t, latents, **options)

    diffusers.scheduler.step = record
    try:
        run()
    finally:
        diffusers.scheduler.step = step
    return steps


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


class TestPredict:
    def test_equals_each_step_of_the_pipeline(
        self,
        request: pytest.FixtureRequest,
        family: TinyFamily,
        diffusers: Any,
        generator: interface.Generator,
        record_difference: Callable[[str, float], None],
    ) -> None:
        condition = family.draw_condition(seed=1, prompts=2)
        steps = record_steps(
            diffusers,
            lambda: family.run(diffusers, condition, generator=seeded(3, 4), num_inference_steps=STEPS),
        )
        assert len(steps) == STEPS
        for expected, t, latents in steps:
            noisy = unpack(diffusers, generator, latents)
            with torch.no_grad():
                prediction = generator.predict(noisy, t.expand(2), condition)
            assert prediction.dtype == torch.float32
            assert float(prediction.std()) > 0.01
            unpacked = unpack(diffusers, generator, expected)
            torch.testing.assert_close(prediction, unpacked, rtol=0, atol=1e-5)
            record_difference(request.node.callspec.params["family"], float((prediction - unpacked).abs().max()))

    def test_depends_on_time_and_condition(self, family: TinyFamily, generator: interface.Generator) -> None:
        noisy = torch.randn(1, *generator.latent_shape, generator=Generator().manual_seed(0))
        one, other = (family.draw_condition(seed=seed) for seed in (1, 2))
        early, late = torch.tensor([900]), torch.tensor([100])
        with torch.no_grad():
            base = generator.predict(noisy, early, one)
            assert float((generator.predict(noisy, late, one) - base).abs().max()) > 1e-4
            assert float((generator.predict(noisy, early, other) - base).abs().max()) > 1e-4

    @pytest.mark.parametrize("family", MASKED, indirect=True)
    def test_masked_positions_are_not_read(self, family: TinyFamily, generator: interface.Generator) -> None:
        condition = family.draw_condition(seed=1)
        assert condition.mask is not None
        noisy = torch.randn(1, *generator.latent_shape, generator=Generator().manual_seed(0))
        others = torch.where(condition.mask[..., None], condition.states, torch.full_like(condition.states, 5.0))
        t = torch.tensor([500])
        with torch.no_grad():
            expected = generator.predict(noisy, t, condition)
            padded = generator.predict(noisy, t, Condition(others, condition.mask, condition.pooled))
        torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5)

    def test_text_projection_reads_the_states(self, family: TinyFamily, generator: interface.Generator) -> None:
        ((name, projection),) = generator.text_projections.items()
        condition = family.draw_condition(seed=1)
        seen: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            generator.predict(torch.zeros(1, *generator.latent_shape), torch.tensor([500]), condition)
            expected = generator.normalize_text(condition.states)[0]
        hook.remove()
        real = LENGTH if condition.mask is None else int(condition.mask.sum())
        torch.testing.assert_close(seen[0].reshape(-1, seen[0].shape[-1])[:real], expected[:real])
        assert f"{name}.weight" in generator.network.state_dict()


class TestSample:
    @pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
    def test_equals_the_pipeline(
        self, family: TinyFamily, diffusers: Any, generator: interface.Generator, guidance_scale: float
    ) -> None:
        """With the same seeds: noise, shift, solver and guidance are the pipeline's own."""
        condition, empty = family.draw_condition(seed=1, prompts=2), family.draw_condition(seed=2)
        both = empty.map(lambda tensor: tensor.expand(2, *tensor.shape[1:]))
        expected = family.run(
            diffusers,
            condition,
            both,
            generator=seeded(3, 4),
            num_inference_steps=STEPS,
            **{family.guidance: guidance_scale},
        )
        drawn = generator.sample(
            condition, empty, generators=seeded(3, 4), num_inference_steps=STEPS, guidance_scale=guidance_scale
        )
        assert drawn.shape == (2, *generator.latent_shape)
        if family.pipeline == "Flux2KleinPipeline":  # it returns the autoencoder's own latents
            drawn = generator.autoencoder.denormalize(drawn)
        torch.testing.assert_close(drawn, unpack(diffusers, generator, expected), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("family", MASKED, indirect=True)
    def test_empty_prompt_may_have_another_length(self, family: TinyFamily, generator: interface.Generator) -> None:
        """With a mask, an empty prompt that is not padded gives the same."""
        condition, empty = family.draw_condition(seed=1), family.draw_condition(seed=2)
        assert empty.mask is not None
        real = int(empty.mask.sum())
        short = empty.map(lambda tensor: tensor[:, :real])
        drawn, expected = (
            generator.sample(condition, each, generators=seeded(3), num_inference_steps=STEPS, guidance_scale=3.0)
            for each in (short, empty)
        )
        largest = float(expected.abs().max())
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4 * max(1.0, largest))


class TestAutoencoder:
    def test_decoding_equals_the_pipeline(
        self, family: TinyFamily, diffusers: Any, generator: interface.Generator
    ) -> None:
        condition = family.draw_condition(seed=1)
        expected = family.run(diffusers, condition, output_type="pt", generator=seeded(3), num_inference_steps=STEPS)
        scale = family.unguided if family.has_negative else 3.5  # the default of the distilled FLUX.1
        latents = generator.sample(
            condition, None, generators=seeded(3), num_inference_steps=STEPS, guidance_scale=scale
        )
        pixels = (generator.decode(latents) / 2 + 0.5).clamp(0, 1)
        assert pixels.shape == (1, 3, family.image, family.image)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)

    def test_encoding_undoes_the_normalization_of_decoding(
        self, family: TinyFamily, generator: interface.Generator
    ) -> None:
        pixels = torch.rand(2, 3, family.image, family.image, generator=Generator().manual_seed(0)) * 2 - 1
        distribution = generator.encode_images(pixels)
        latents = (distribution.mean - distribution.shift) * distribution.scale  # x_0
        assert latents.shape == (2, *generator.latent_shape)
        model = generator.autoencoder.model
        with torch.no_grad():
            raw = model.encode(pixels[:, :, None] if type(model).__name__ == "AutoencoderKLQwenImage" else pixels)
        expected = raw.latent_dist.mean if hasattr(raw, "latent_dist") else raw.latent
        torch.testing.assert_close(generator.autoencoder.denormalize(latents), expected, rtol=1e-4, atol=1e-4)
        drawn = distribution.sample(torch.tensor([1]), generator=Generator().manual_seed(0))
        noise = torch.randn(1, *generator.latent_shape, generator=Generator().manual_seed(0))
        torch.testing.assert_close(drawn, latents[1:] + noise * distribution.std[1:] * distribution.scale)


class TestCheckpointing:
    def test_gradient_is_the_same(self, family: TinyFamily, folder: Path, generator: interface.Generator) -> None:
        saving = load_generator(
            folder, device=torch.device("cpu"), dtype=torch.float32, autoencoder_dtype=torch.float32
        )
        assert saving.enable_checkpointing()
        assert not saving.enable_checkpointing()  # it is on already
        noisy = torch.randn(1, *generator.latent_shape, generator=Generator().manual_seed(0))
        gradients = []
        for each in (generator, saving):
            condition = family.draw_condition(seed=1)
            states = condition.states.requires_grad_()
            prediction = each.predict(noisy, torch.tensor([500]), condition)
            gradients.append(torch.autograd.grad(prediction.square().sum(), states)[0])
        assert float(gradients[0].abs().max()) > 1e-5
        torch.testing.assert_close(*gradients)
