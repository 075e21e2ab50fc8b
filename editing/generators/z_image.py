"""The transformer of Z-Image."""

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer


class ZImage(FlowTransformer):
    """Takes 1 - σ and lists of latents and of states without padding, and predicts x_0 - ε."""

    network_class = ZImageTransformer2DModel
    text_projection = "cap_embedder.1"
    sample_size_of = "autoencoder"

    def normalize_text(self, states: Tensor) -> Tensor:
        normed: Tensor = self.network.cap_embedder[0](states)
        return normed

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 0

    def guide(self, unguided: Tensor, guided: Tensor, *, guidance_scale: float) -> Tensor:
        """Combine the predictions as this pipeline does: its scale 0 is what others call 1."""
        return guided + guidance_scale * (guided - unguided)

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        states = list(condition.states)
        if condition.mask is not None:
            lengths = condition.mask.sum(1).tolist()  # the tokens are at the left
            states = [own[:length] for own, length in zip(states, lengths, strict=True)]
        predictions = self.network(list(noisy[:, :, None]), (1000 - timesteps) / 1000, states).sample
        return -torch.stack(predictions)[:, :, 0]
