"""What draws a picture from a condition: the interface of U-Nets and transformers.

Latents x_t are normalized as the generator was trained on them, and never packed into sequences outside `predict`.

Shapes: b latents; c, h, w their channels, height and width; p prompts.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from editing.chunks import ChunkSize
from editing.condition import Condition
from editing.generators.autoencoder import Autoencoder, LatentDistribution


@dataclass(frozen=True)
class NoisedLatents:
    """Latents at random times of the noise schedule, and what a generator trained on them predicts."""

    noisy: Tensor
    """x_t (b, c, h, w) float32"""
    timesteps: Tensor
    """t (b,), in the unit of the scheduler"""
    target: Tensor
    """(b, c, h, w) float32: ε, v or ε - x_0"""


class Generator(ABC):
    """A generator with its autoencoder and scheduler. Its modules are in eval mode and take no gradients."""

    component: ClassVar[str] = "transformer"
    """The folder of its weights in a pipeline."""

    def __init__(
        self,
        network: Any,
        autoencoder: Autoencoder,
        scheduler: Any,
        *,
        image_size: tuple[int, int],
    ) -> None:
        self.network = network
        self.autoencoder = autoencoder
        self.scheduler = scheduler
        self.image_size = image_size
        """Height and width in pixels of the pictures that are drawn and encoded."""
        self.chunks = ChunkSize.for_device(self.device, save_memory=self.enable_checkpointing)
        """The number of latents that go through the network at a time, with gradients."""
        self.inference_chunks = ChunkSize.for_device(self.device)
        """The same without gradients."""
        self.picture_chunks = ChunkSize.for_device(self.device)
        """The number of pictures that go through the autoencoder at a time."""
        self._saves_memory = False

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""
        height, width = self.image_size
        return self.autoencoder.channels, height // self.autoencoder.downscale, width // self.autoencoder.downscale

    @property
    @abstractmethod
    def text_projections(self) -> Mapping[str, nn.Linear]:
        """The matrices (o, D) that read the condition's states, by name in the network."""

    def normalize_text(self, states: Tensor) -> Tensor:
        """Return what the text projections get for the condition's states, (…, D) to (…, D)."""
        return states

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures (images, 3, height, width) in [-1, 1], as many at a time as fit into memory."""
        parts = self.picture_chunks.run_in_chunks(len(pixels), lambda chunk: self.autoencoder.encode(pixels[chunk]))
        return LatentDistribution.join(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode x_0 (b, c, h, w) to pictures (b, 3, height, width) float32 around [-1, 1].

        As many go through the autoencoder at a time as fit into memory.
        """
        return torch.cat(
            self.picture_chunks.run_in_chunks(len(latents), lambda chunk: self.autoencoder.decode(latents[chunk]))
        )

    @abstractmethod
    def add_noise(self, latents: Tensor, *, generator: torch.Generator) -> NoisedLatents:
        """Add noise to x_0 (b, c, h, w) at random times, as in training.

        Random numbers are drawn on the CPU, so that a seed gives the same on any device.
        """

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the network's prediction (b, c, h, w) float32, in the convention of `NoisedLatents.target`.

        Takes x_t (b, c, h, w), t (b,) and a condition of b prompts.
        """

    @torch.no_grad()
    def predict_in_chunks(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Call `predict` without gradients on as many latents at a time as fit into memory."""

        def predict(chunk: slice) -> Tensor:
            return self.predict(noisy[chunk], timesteps[chunk], condition[chunk])

        return torch.cat(self.inference_chunks.run_in_chunks(len(noisy), predict))

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        empty: Condition | None,
        *,
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Draw latents x_0 (p, c, h, w) for p conditions, each from its own generator, as diffusers' pipeline does.

        `empty` is the condition of one empty prompt, which only guided sampling needs. The generators of random numbers
        are on the CPU, so that a seed gives the same noise on any device.
        """
        noise = [torch.randn(self.latent_shape, generator=generator) for generator in generators]
        latents = torch.stack(noise).to(self.device)
        scheduler = self.start_scheduler(num_inference_steps)
        drawing = self.embed_guidance(guidance_scale)
        for t in scheduler.timesteps:
            prediction = drawing._predict_guided(latents, t, condition, empty, guidance_scale=guidance_scale)
            latents = scheduler.step(prediction, t, latents).prev_sample
        return latents

    @abstractmethod
    def start_scheduler(self, num_inference_steps: int) -> Any:
        """Return a scheduler with its timesteps set. It has state: one for each run."""

    def is_guided(self, guidance_scale: float) -> bool:
        """Return whether sampling with this scale needs the empty prompt."""
        return guidance_scale > 1.0

    def embed_guidance(self, guidance_scale: float) -> "Generator":  # noqa: ARG002
        """Return the generator with the scale as an input of its network, if it takes one."""
        return self

    def _predict_guided(
        self, noisy: Tensor, t: Tensor, condition: Condition, empty: Condition | None, *, guidance_scale: float
    ) -> Tensor:
        timesteps = t.expand(len(noisy)).to(self.device)
        if not self.is_guided(guidance_scale):
            return self.predict_in_chunks(noisy, timesteps, condition)
        assert empty
        unguided = empty.map(lambda tensor: tensor.expand(len(noisy), *tensor.shape[1:]))
        if empty.states.shape[1] == condition.states.shape[1]:  # one pass for both
            both = Condition.concatenate([unguided, condition])
            predictions = self.predict_in_chunks(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        else:
            predictions = tuple(self.predict_in_chunks(noisy, timesteps, each) for each in (unguided, condition))
        return self.guide(*predictions, guidance_scale=guidance_scale)

    def guide(self, unguided: Tensor, guided: Tensor, *, guidance_scale: float) -> Tensor:
        """Combine the predictions (b, c, h, w) without and with the prompt: classifier-free guidance."""
        return unguided + guidance_scale * (guided - unguided)

    def enable_checkpointing(self) -> bool:
        """Compute each block again in the backward pass instead of keeping its activations. Return False if it does.

        It wraps the blocks itself: some of diffusers' own checkpointing drops arguments, such as Chroma's mask.
        """
        if self._saves_memory:
            return False
        for child in self.network.children():
            for block in child if isinstance(child, nn.ModuleList) else ():
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
        self._saves_memory = True
        return True
