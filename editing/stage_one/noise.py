"""The noised latents of the noise losses of stage I, and what the generator should predict for them.

Shapes: c, h, w latent channels, height and width; b noised latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from editing.edits import StageOneSettings
from editing.errors import ImageRejected
from editing.pictures.decode import convert_to_rgb
from editing.pipelines import EditablePipeline

_PICTURES = 64  # drawn at a time


@dataclass(frozen=True)
class NoiseBatch:
    noisy: Tensor
    """x_t (b, c, h, w) float32"""
    timesteps: Tensor
    """t (b,), in the unit of the scheduler"""
    target: Tensor
    """(b, c, h, w) float32: ε(x_t, E(p̂), t) of Eq. 3, or ε_t of Eq. 4; v or ε - x_0 for generators of that kind"""
    templates: Tensor
    """(b,): the template whose source prompt the generator gets for each latent"""


class NoiseSource(Protocol):
    def draw_batch(self) -> NoiseBatch:
        """Draw the `noise_batch_size` latents of one step."""
        ...


@dataclass(frozen=True)
class NoisedPrompts:
    """The noised latents of one step of e optimizations, each with the source prompt that the generator gets for it."""

    noisy: Tensor
    """x_t (b, c, h, w)"""
    timesteps: Tensor
    """t (b,)"""
    target: Tensor
    """(b, c, h, w)"""
    prompts: Tensor
    """(b,): the index of the prompt, in the template of the picture that the latents come from."""
    owners: Tensor
    """(b,): the optimization"""
    shares: Tensor
    """(b,): L_noise is a mean over the latents of an optimization."""
    optimizations: int
    """e"""

    @classmethod
    def draw(cls, sources: Sequence[NoiseSource], first: Tensor) -> "NoisedPrompts":
        """Draw the latents of a step. `first` (e,) is the index of the first prompt of each optimization."""
        drawn = [source.draw_batch() for source in sources]
        size = torch.tensor([len(batch.timesteps) for batch in drawn], device=first.device)  # (e,)
        owners = torch.arange(len(drawn), device=first.device).repeat_interleave(size)  # (b,)
        return cls(
            noisy=torch.cat([batch.noisy for batch in drawn]),
            timesteps=torch.cat([batch.timesteps for batch in drawn]),
            target=torch.cat([batch.target for batch in drawn]),
            prompts=first[owners] + torch.cat([batch.templates for batch in drawn]),
            owners=owners,
            shares=1 / size[owners],
            optimizations=len(drawn),
        )

    def select_prompts(self) -> tuple[Tensor, "NoisedPrompts"]:
        """Return the indices of the prompts that have latents, and the batch with indices among these."""
        used, prompts = self.prompts.unique(return_inverse=True)
        return used, replace(self, prompts=prompts)

    def sum_by_optimization(self, errors: Tensor) -> Tensor:
        """Sum the errors (b,) of the latents of each optimization, (e,)."""
        return errors.new_zeros(self.optimizations).index_add_(0, self.owners, errors)


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
        latents: Tensor,
        settings: StageOneSettings,
        generator: torch.Generator,
    ) -> None:
        """`latents` are x_0 (images, c, h, w) of `draw_destinations`."""
        image = torch.arange(settings.noise_pool_size) % settings.num_images  # (pool,)
        noised = pipeline.generator.add_noise(latents[image], generator=generator)
        condition = pipeline.encode(destinations)  # E(p̂), one row for each template
        templates = (image % len(destinations)).to(pipeline.device)  # (pool,)
        # The target of Eq. 3 does not depend on δ: one prediction for each latent serves all steps.
        target = pipeline.generator.predict_in_chunks(noised.noisy, noised.timesteps, condition[templates])
        self._pool = NoiseBatch(noised.noisy, noised.timesteps, target, templates)
        self._size = settings.noise_batch_size
        self._generator = generator

    def draw_batch(self) -> NoiseBatch:
        pool = self._pool
        chosen = torch.randint(len(pool.noisy), (self._size,), generator=self._generator).to(pool.noisy.device)
        return NoiseBatch(pool.noisy[chosen], pool.timesteps[chosen], pool.target[chosen], pool.templates[chosen])


@torch.no_grad()
def draw_destinations(
    pipeline: EditablePipeline, edits: Sequence[tuple[Sequence[str], StageOneSettings, torch.Generator]]
) -> list[Tensor]:
    """Draw the pictures of each edit's destination prompts, x_0 (images, c, h, w), from its generator of seeds.

    Those of all edits share batches: a pass of few latents leaves a GPU idle.
    """
    drawn: list[list[Tensor]] = [[] for _ in edits]
    by_sampling: dict[tuple[int | None, float | None], list[tuple[int, str, int]]] = {}
    for index, (destinations, settings, generator) in enumerate(edits):
        seeds = torch.randint(2**62, (settings.num_images,), generator=generator).tolist()
        pictures = by_sampling.setdefault((settings.num_inference_steps, settings.guidance_scale), [])
        pictures += [(index, destinations[image % len(destinations)], seed) for image, seed in enumerate(seeds)]
    for (steps, scale), pictures in by_sampling.items():
        for start in range(0, len(pictures), _PICTURES):
            chosen = pictures[start : start + _PICTURES]
            latents = pipeline.sample(
                [prompt for _, prompt, _ in chosen],
                generators=[torch.Generator().manual_seed(seed) for *_, seed in chosen],
                num_inference_steps=steps,
                guidance_scale=scale,
            )
            for (index, _, _), own in zip(chosen, latents, strict=True):
                drawn[index].append(own)
    return [torch.stack(own) for own in drawn]


class ReferenceNoise:
    """Eq. 4: x_t comes from the reference images; the target is what the generator is trained on, such as the noise.

    The images are encoded once, and each x_0 is a sample of the autoencoder's posterior. The target needs no pass of
    the generator, so each step draws fresh noise instead of taking it from a pool.
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
        size = pipeline.generator.image_size
        pixels = torch.stack([to_pixels(image, size=size, index=i) for i, image in enumerate(images)])
        self._latents = pipeline.generator.encode_images(pixels)
        self._pipeline = pipeline
        self._templates = templates
        self._size = settings.noise_batch_size
        self._generator = generator

    def draw_batch(self) -> NoiseBatch:
        image = torch.randint(len(self._latents.mean), (self._size,), generator=self._generator)  # (b,)
        templates = torch.randint(self._templates, (self._size,), generator=self._generator)  # (b,)
        latents = self._latents.sample(image, generator=self._generator)  # x_0 (b, c, h, w)
        noised = self._pipeline.generator.add_noise(latents, generator=self._generator)
        return NoiseBatch(noised.noisy, noised.timesteps, noised.target, templates.to(latents.device))


def to_pixels(image: Image.Image, *, size: tuple[int, int], index: int = 0) -> Tensor:
    """Convert a picture by `convert_to_rgb`, crop and scale it to (3, height, width) in [-1, 1].

    Raises `ImageRejected` with a pointer to the reference image `index`.
    """
    height, width = size
    try:
        fitted = ImageOps.fit(convert_to_rgb(image), (width, height), method=Image.Resampling.LANCZOS)
    except ImageRejected as error:
        raise ImageRejected(error.detail, pointer=f"/destination/images/{index}") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes lazily: a damaged file fails here
        raise ImageRejected(f"the image cannot be decoded: {error}", pointer=f"/destination/images/{index}") from error
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
