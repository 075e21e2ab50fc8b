"""The autoencoder of a pipeline, with the latents normalized as its generator was trained on them.

Shapes: c, h, w channels, height and width of the normalized latents; z channels of the autoencoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from editing.errors import UnsupportedPipeline

SUPPORTED = (
    "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderDC", "AutoencoderTiny",
)  # fmt: skip


@dataclass(frozen=True)
class LatentDistribution:
    """The latents of pictures: a normal distribution for each, of width 0 if there is only one."""

    mean: Tensor
    """(images, c, h, w) float32, not normalized"""
    std: Tensor
    """(images, c, h, w) float32"""
    shift: Tensor
    """(c or 1, 1, 1)"""
    scale: Tensor
    """(c or 1, 1, 1)"""

    @classmethod
    def join(cls, parts: Sequence["LatentDistribution"]) -> "LatentDistribution":
        """Join the distributions of an autoencoder's pictures, in order."""
        mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
        return replace(parts[0], mean=mean, std=std)

    def sample(self, images: Tensor, *, generator: Generator) -> Tensor:
        """Draw x_0 (b, c, h, w) of these images (b,). The generator is on the CPU, for the same noise on any device."""
        mean, std = self.mean[images], self.std[images]
        latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
        return (latents - self.shift) * self.scale


class Autoencoder:
    """Encodes pictures into normalized latents x_0 and decodes them.

    x_0 = (latents - shift) · scale, where shift and scale are numbers (`shift_factor`, `scaling_factor`) or vectors
    over the channels (`latents_mean` and `latents_std` of Qwen-Image; the batch norm of FLUX.2, over 2 by 2 patches).
    """

    def __init__(self, model: Any) -> None:
        kind, config = type(model).__name__, model.config
        if kind not in SUPPORTED:
            raise UnsupportedPipeline(f"a {kind} cannot be used: only {', '.join(SUPPORTED)}")
        self.model = model
        self.channels: int
        """c"""
        self.downscale: int
        """Pixels that one latent stands for, in each direction."""
        self._patch = 1  # edge of the patches whose pixels become channels
        self._has_frames = kind == "AutoencoderKLQwenImage"
        shift, scale = torch.tensor(0.0), torch.tensor(1.0)
        if kind == "AutoencoderKLQwenImage":
            shift, scale = torch.tensor(config.latents_mean), 1 / torch.tensor(config.latents_std)
            self.downscale = 2 ** (len(config.dim_mult) - 1)
            self.channels = config.z_dim
        elif kind == "AutoencoderKLFlux2":
            self._patch = config.patch_size[0]
            shift, scale = model.bn.running_mean, 1 / (model.bn.running_var + config.batch_norm_eps).sqrt()
            self.downscale = 2 ** (len(config.block_out_channels) - 1) * self._patch
            self.channels = config.latent_channels * self._patch**2
        else:
            shift = torch.tensor(config.get("shift_factor") or 0.0)
            scale = torch.tensor(config.scaling_factor)
            widths = config.get("encoder_block_out_channels") or config.block_out_channels
            self.downscale = 2 ** (len(widths) - 1)
            self.channels = config.latent_channels
        device = next(model.parameters()).device
        self._shift = shift.to(device, torch.float32).view(-1, 1, 1)  # (c or 1, 1, 1)
        self._scale = scale.to(device, torch.float32).view(-1, 1, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures (images, 3, height, width) in [-1, 1]."""
        pixels = pixels.to(self._shift.device, self.model.dtype)
        encoded = self.model.encode(pixels[:, :, None] if self._has_frames else pixels)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean = encoded.latent if hasattr(encoded, "latent") else encoded.latents
            std = torch.zeros_like(mean)
        mean, std = self._to_patches(mean.float()), self._to_patches(std.float())
        return LatentDistribution(mean, std, self._shift, self._scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode x_0 (b, c, h, w) to pictures (b, 3, height, width) float32 around [-1, 1]."""
        pixels: Tensor = self.model.decode(self.denormalize(latents).to(self.model.dtype)).sample.float()
        return pixels[:, :, 0] if self._has_frames else pixels

    def denormalize(self, latents: Tensor) -> Tensor:
        """Return the autoencoder's own latents (b, z, …) of x_0 (b, c, h, w)."""
        raw = self._from_patches(latents / self._scale + self._shift)
        return raw[:, :, None] if self._has_frames else raw

    def _to_patches(self, latents: Tensor) -> Tensor:
        """Fold patches into channels, (b, z, H, W) to (b, c, h, w). The frames axis of one frame is dropped."""
        latents = latents[:, :, 0] if self._has_frames else latents
        return nn.functional.pixel_unshuffle(latents, self._patch)

    def _from_patches(self, latents: Tensor) -> Tensor:
        """Undo `_to_patches`, but for the frames."""
        return nn.functional.pixel_shuffle(latents, self._patch)
