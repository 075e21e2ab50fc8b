"""The noised latents of the noise losses of stage I, and what the U-Net should predict for them.

Shapes: c, h, w latent channels, height and width; b noised latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from editing.edits import StageOneSettings
from editing.errors import ImageRejected
from editing.pipelines import EditablePipeline


@dataclass(frozen=True)
class NoiseBatch:
    noisy: Tensor
    """x_t (b, c, h, w) float32"""
    timesteps: Tensor
    """t (b,)"""
    target: Tensor
    """(b, c, h, w) float32: ε(x_t, E(p̂), t) of Eq. 3, or ε_t of Eq. 4"""
    templates: Tensor
    """(b,): the template whose source prompt the U-Net gets for each latent"""


class NoiseSource(Protocol):
    def draw_batch(self) -> NoiseBatch:
        """Draw the `noise_batch_size` latents of one step."""
        ...


class DestinationNoise:
    """Eq. 3: x_t comes from pictures of the destination, the target from the destination's own prompts.

    The pictures are drawn once, and so is a pool of (x_t, t, ε_dst), from which each step takes a few. The solver's
    latents are used as they are: decoding and encoding them again would only blur them.
    """

    def __init__(
        self,
        pipeline: EditablePipeline,
        destinations: Sequence[str],
        *,
        settings: StageOneSettings,
        generator: torch.Generator,
    ) -> None:
        prompts = [destinations[image % len(destinations)] for image in range(settings.num_images)]
        seeds = torch.randint(2**62, (settings.num_images,), generator=generator).tolist()
        latents = pipeline.sample(  # x_0 (images, c, h, w)
            prompts,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        image = torch.arange(settings.noise_pool_size) % settings.num_images  # (pool,)
        noisy, timesteps, _ = add_noise(pipeline, latents[image], generator=generator)
        condition = pipeline.encode(destinations)  # E(p̂), one row for each template
        templates = (image % len(destinations)).to(pipeline.device)  # (pool,)
        # The target of Eq. 3 does not depend on δ: one prediction for each latent serves all steps.
        target = pipeline.predict_in_chunks(noisy, timesteps, condition[templates])
        self._pool = NoiseBatch(noisy, timesteps, target, templates)
        self._size = settings.noise_batch_size
        self._generator = generator

    def draw_batch(self) -> NoiseBatch:
        pool = self._pool
        chosen = torch.randint(len(pool.noisy), (self._size,), generator=self._generator).to(pool.noisy.device)
        return NoiseBatch(pool.noisy[chosen], pool.timesteps[chosen], pool.target[chosen], pool.templates[chosen])


class ReferenceNoise:
    """Eq. 4: x_t comes from the reference images; the target is the added noise, or the velocity for such U-Nets.

    The images are encoded once, and each x_0 is a sample of the autoencoder's posterior. The target needs no U-Net, so
    each step draws fresh noise instead of taking it from a pool.
    """

    def __init__(
        self,
        pipeline: EditablePipeline,
        images: Sequence[Image.Image],
        *,
        templates: int,
        settings: StageOneSettings,
        generator: torch.Generator,
    ) -> None:
        pixels = torch.stack([to_pixels(image, size=pipeline.image_size, index=i) for i, image in enumerate(images)])
        with torch.no_grad():
            vae = pipeline.vae
            posterior = vae.encode(pixels.to(pipeline.device, vae.dtype)).latent_dist
        self._mean = posterior.mean.float()  # (images, c, h, w)
        self._std = posterior.std.float()  # (images, c, h, w)
        self._pipeline = pipeline
        self._templates = templates
        self._size = settings.noise_batch_size
        self._generator = generator

    def draw_batch(self) -> NoiseBatch:
        image = torch.randint(len(self._mean), (self._size,), generator=self._generator)  # (b,)
        templates = torch.randint(self._templates, (self._size,), generator=self._generator)  # (b,)
        mean, std = self._mean[image], self._std[image]
        sample = mean + std * torch.randn(mean.shape, generator=self._generator).to(mean.device)
        latents = sample * self._pipeline.vae.config.scaling_factor  # x_0
        noisy, timesteps, noise = add_noise(self._pipeline, latents, generator=self._generator)
        target = noise
        if self._pipeline.predicts_velocity:
            # v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (Salimans and Ho, 2022)
            signal = self._pipeline.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        return NoiseBatch(noisy, timesteps, target, templates.to(mean.device))


def add_noise(
    pipeline: EditablePipeline, latents: Tensor, *, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε (b, c, h, w) at uniform t, with t (b,) and ε.

    Random numbers are drawn on the CPU, so that a seed gives the same on any device.
    """
    alphas = pipeline.alphas_cumprod
    timesteps = torch.randint(len(alphas), (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    signal = alphas[timesteps].view(-1, 1, 1, 1)  # ᾱ_t
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise, timesteps, noise


def to_pixels(image: Image.Image, *, size: tuple[int, int], index: int = 0) -> Tensor:
    """Crop and scale a picture to (3, height, width) in [-1, 1]. Transparency becomes white.

    Raises `ImageRejected` with a pointer to the reference image `index`.
    """
    height, width = size
    try:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        fitted = ImageOps.fit(opaque, (width, height), method=Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes lazily: a damaged file fails here
        raise ImageRejected(f"the image cannot be decoded: {error}", pointer=f"/destination/images/{index}") from error
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
