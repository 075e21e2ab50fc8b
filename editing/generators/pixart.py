"""The transformer of PixArt-α and PixArt-Σ, which predicts ε."""

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.diffusion import DiffusionGenerator
from editing.generators.transformer import Transformer


class PixArt(DiffusionGenerator, Transformer):
    """Takes t itself and a mask. The large PixArt-α also gets the picture's size."""

    network_class = PixArtTransformer2DModel
    text_projection = "caption_projection.linear_1"

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            height, width = self.image_size
            resolution = torch.tensor([height, width], dtype=noisy.dtype, device=noisy.device)
            aspect_ratio = torch.tensor([height / width], dtype=noisy.dtype, device=noisy.device)
            size = {
                "resolution": resolution.expand(len(noisy), -1),
                "aspect_ratio": aspect_ratio.expand(len(noisy), -1),
            }
        prediction: Tensor = self.network(
            noisy,
            encoder_hidden_states=condition.states,
            encoder_attention_mask=condition.mask,
            timestep=timesteps,
            added_cond_kwargs=size,
        ).sample
        return prediction[:, : noisy.shape[1]]  # without the learned variance
