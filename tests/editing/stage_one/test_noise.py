"""What the noise losses compare: x_t, t, and what ε should be."""

import dataclasses
from io import BytesIO
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Generator, Tensor

from editing.edits import StageOneSettings
from editing.errors import ImageRejected
from editing.pipelines import EditablePipeline
from editing.stage_one import noise as noise_module
from editing.stage_one.noise import DestinationNoise, NoiseBatch, ReferenceNoise, draw_destinations, to_pixels

SETTINGS = StageOneSettings(
    num_images=3, noise_pool_size=12, noise_batch_size=5, num_inference_steps=2, guidance_scale=2.0
)
DESTINATIONS = ("a dog", "dog")


def destination_noise(pipeline: EditablePipeline, *, seed: int = 0) -> DestinationNoise:
    generator = Generator().manual_seed(seed)
    (latents,) = draw_destinations(pipeline, [(DESTINATIONS, SETTINGS, generator)])
    return DestinationNoise(pipeline, DESTINATIONS, latents=latents, settings=SETTINGS, generator=generator)


def reference_noise(pipeline: EditablePipeline, *, seed: int = 0) -> ReferenceNoise:
    return ReferenceNoise(
        pipeline,
        [Image.new("RGB", (9, 9), color) for color in ("red", "blue")],
        templates=2,
        settings=SETTINGS,
        generator=Generator().manual_seed(seed),
    )


def clean(pipeline: EditablePipeline, batch: NoiseBatch, noise: Tensor) -> Tensor:
    """x_0, back from x_t."""
    signal = pipeline.generator.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    return (batch.noisy - (1 - signal).sqrt() * noise) / signal.sqrt()


def test_add_noise_equals_the_schedulers(pipeline: EditablePipeline) -> None:
    latents = torch.ones(6, *pipeline.generator.latent_shape)
    noised = pipeline.generator.add_noise(latents, generator=Generator().manual_seed(0))
    scheduler = DDPMScheduler.from_config(pipeline.generator.scheduler.config)
    torch.testing.assert_close(noised.noisy, scheduler.add_noise(latents, noised.target, noised.timesteps))


def test_sdxl_input_equals_that_of_its_euler_solver(sdxl: EditablePipeline) -> None:
    """Euler's x_0 + σ ε, scaled as it scales the U-Net's input, is our x_t."""
    assert sdxl.folder
    euler = EulerDiscreteScheduler.from_pretrained(sdxl.folder / "scheduler")
    latents = torch.randn(1, *sdxl.generator.latent_shape, generator=Generator().manual_seed(1))
    for seed in range(5):
        noised = sdxl.generator.add_noise(latents, generator=Generator().manual_seed(seed))
        euler.set_timesteps(timesteps=noised.timesteps.tolist())
        fed = euler.scale_model_input(euler.add_noise(latents, noised.target, euler.timesteps), euler.timesteps[0])
        torch.testing.assert_close(noised.noisy, fed, rtol=1e-4, atol=1e-4)


def test_timesteps_are_uniform(pipeline: EditablePipeline) -> None:
    noised = pipeline.generator.add_noise(torch.zeros(9000, 1, 1, 1), generator=Generator().manual_seed(0))
    timesteps = noised.timesteps
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
    assert timesteps.float().mean() == pytest.approx(499.5, abs=15)


def test_pictures_of_several_edits_share_batches(pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each edit gets the pictures that it gets alone, also where its sampling differs from the others'."""
    monkeypatch.setattr(noise_module, "_PICTURES", 4)
    longer = dataclasses.replace(SETTINGS, num_inference_steps=3)
    edits = ((DESTINATIONS, SETTINGS), (("a cat",), longer), (("a fish", "fish"), SETTINGS))

    def wanted(edit: tuple[tuple[str, ...], StageOneSettings], seed: int) -> Any:
        return *edit, Generator().manual_seed(seed)

    together = draw_destinations(pipeline, [wanted(edit, seed) for seed, edit in enumerate(edits)])
    for seed, (edit, found) in enumerate(zip(edits, together, strict=True)):
        (alone,) = draw_destinations(pipeline, [wanted(edit, seed)])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


class TestDestinationNoise:
    def test_target_is_the_prediction_for_the_destination(self, pipeline: EditablePipeline) -> None:
        batch = destination_noise(pipeline).draw_batch()
        assert batch.noisy.shape == (5, *pipeline.generator.latent_shape)
        expected = pipeline.generator.predict(
            batch.noisy, batch.timesteps, pipeline.encode(DESTINATIONS)[batch.templates]
        )
        torch.testing.assert_close(batch.target, expected)

    def test_pictures_are_spread_over_the_templates(self, pipeline: EditablePipeline) -> None:
        noise = destination_noise(pipeline)
        assert set(torch.cat([noise.draw_batch().templates for _ in range(10)]).tolist()) == {0, 1}

    def test_batches_come_from_one_pool(self, pipeline: EditablePipeline) -> None:
        noise = destination_noise(pipeline)
        drawn = torch.cat([noise.draw_batch().noisy for _ in range(40)]).flatten(1)
        assert len(drawn.unique(dim=0)) == SETTINGS.noise_pool_size

    def test_seed_determines_the_noise(self, pipeline: EditablePipeline) -> None:
        first, again, other = (destination_noise(pipeline, seed=seed).draw_batch() for seed in (0, 0, 1))
        assert torch.equal(first.noisy, again.noisy)
        assert torch.equal(first.target, again.target)
        assert not torch.equal(first.noisy, other.noisy)


class TestReferenceNoise:
    def test_target_is_the_added_noise(self, pipeline: EditablePipeline) -> None:
        batch = reference_noise(pipeline).draw_batch()
        pixels = torch.stack([to_pixels(Image.new("RGB", (9, 9), color), size=(16, 16)) for color in ("red", "blue")])
        posterior = pipeline.generator.autoencoder.model.encode(pixels).latent_dist
        scale = pipeline.generator.autoencoder.model.config.scaling_factor
        x_0 = clean(pipeline, batch, batch.target) / scale  # (b, c, h, w): a sample of one posterior or the other
        distance = ((x_0[:, None] - posterior.mean) / posterior.std).abs().amax((2, 3, 4))  # (b, images)
        early = batch.timesteps < 900  # late x_t keep too little of x_0 for float32
        assert (distance.min(dim=1).values[early] < 6).all()

    def test_target_is_the_velocity_for_velocity_prediction(self, sd2: EditablePipeline) -> None:
        batch = reference_noise(sd2).draw_batch()
        signal = sd2.generator.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
        x_0 = signal.sqrt() * batch.noisy - (1 - signal).sqrt() * batch.target
        noise = (1 - signal).sqrt() * batch.noisy + signal.sqrt() * batch.target
        expected = DDPMScheduler.from_config(sd2.generator.scheduler.config).get_velocity(x_0, noise, batch.timesteps)
        torch.testing.assert_close(batch.target, expected)
        pixels = torch.stack([to_pixels(Image.new("RGB", (9, 9), color), size=(16, 16)) for color in ("red", "blue")])
        posterior = sd2.generator.autoencoder.model.encode(pixels).latent_dist
        sample = x_0 / sd2.generator.autoencoder.model.config.scaling_factor
        distance = ((sample[:, None] - posterior.mean) / posterior.std).abs().amax((2, 3, 4))  # (b, images)
        assert (distance.min(dim=1).values < 6).all()
        assert noise.abs().max() < 6

    def test_each_step_has_fresh_noise(self, pipeline: EditablePipeline) -> None:
        noise = reference_noise(pipeline)
        assert not torch.equal(noise.draw_batch().target, noise.draw_batch().target)
        assert torch.equal(reference_noise(pipeline).draw_batch().noisy, reference_noise(pipeline).draw_batch().noisy)


class TestToPixels:
    def test_pixels_are_between_minus_one_and_one(self) -> None:
        pixels = to_pixels(Image.new("RGB", (3, 5), (255, 0, 128)), size=(4, 8))
        assert pixels.shape == (3, 4, 8)
        assert pixels[:, 0, 0].tolist() == pytest.approx([1, -1, 0.00392], abs=1e-4)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_becomes_white(self, mode: str) -> None:
        picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
        if mode == "P":
            picture = Image.new("P", (4, 4))
            picture.info["transparency"] = 0
        assert to_pixels(picture, size=(4, 4)).min() == 1

    def test_picture_is_cropped_to_its_center(self) -> None:
        picture = Image.new("RGB", (12, 4), "white")
        picture.paste("black", (4, 0, 8, 4))
        assert to_pixels(picture, size=(4, 4)).max() == -1

    def test_exif_orientation_is_applied(self) -> None:
        picture = Image.new("RGB", (4, 4), "white")
        picture.paste("black", (0, 0, 4, 2))  # the upper half
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        content = BytesIO()
        picture.save(content, "PNG", exif=exif)
        pixels = to_pixels(Image.open(content), size=(4, 4))
        assert pixels[:, 0].min() == 1
        assert pixels[:, 3].max() == -1

    def test_damaged_file_is_refused(self) -> None:
        content = BytesIO()
        Image.effect_noise((64, 64), 50).save(content, "PNG")
        picture = Image.open(BytesIO(content.getvalue()[:500]))
        with pytest.raises(ImageRejected) as refusal:
            to_pixels(picture, size=(4, 4), index=2)
        assert refusal.value.pointer == "/destination/images/2"
