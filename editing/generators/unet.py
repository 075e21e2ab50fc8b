"""The U-Net of Stable Diffusion 1.x, 2.x and SDXL.

Shapes: b latents; c, h, w their channels, height and width.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from editing.condition import Condition
from editing.errors import UnsupportedPipeline
from editing.generators.diffusion import DiffusionGenerator


class UNet(DiffusionGenerator):
    """A U-Net that reads the condition's states in cross-attention, and SDXL's pooled output beside the time."""

    component: ClassVar[str] = "unet"

    @cached_property
    def text_projections(self) -> Mapping[str, nn.Linear]:
        """The key and value projections (o, D) of every cross-attention. Raises `UnsupportedPipeline`."""
        projections: dict[str, nn.Linear] = {}
        for name, module in self.network.named_modules():
            if isinstance(module, Attention) and module.is_cross_attention:
                projections |= {f"{name}.to_k": module.to_k, f"{name}.to_v": module.to_v}
        if len({projection.in_features for projection in projections.values()}) != 1:
            raise UnsupportedPipeline(
                "the U-Net has no cross-attention, or its cross-attention reads states of several widths"
            )
        return projections

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale != 1.0

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return ε or v, (b, c, h, w) float32.

        SDXL also gets the picture's size: that of its training pictures, not cropped.
        """
        dtype = self.network.dtype
        added = None
        if condition.pooled is not None:
            height, width = self.image_size
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=noisy.device)
            added = {"text_embeds": condition.pooled.to(dtype), "time_ids": sizes.expand(len(noisy), -1)}
        prediction: Tensor = self.network(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=condition.states.to(dtype),
            added_cond_kwargs=added,
        ).sample
        return prediction.float()
