"""The transformer of Lumina 2."""

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer


class Lumina2(FlowTransformer):
    """Takes 1 - σ and a mask, and predicts x_0 - ε."""

    network_class = Lumina2Transformer2DModel
    text_projection = "time_caption_embed.caption_embedder.1"

    def normalize_text(self, states: Tensor) -> Tensor:
        normed: Tensor = self.network.time_caption_embed.caption_embedder[0](states)
        return normed

    def count_tokens(self) -> int:
        """Return the number of channels: diffusers' pipeline takes that axis for the tokens'."""
        return self.latent_shape[0]

    def guide(self, unguided: Tensor, guided: Tensor, *, guidance_scale: float) -> Tensor:
        """Combine the predictions, and give each row of latents the norm that it has with the prompt."""
        combined = super().guide(unguided, guided, guidance_scale=guidance_scale)
        return combined * (guided.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        mask = condition.mask
        if mask is None:
            mask = torch.ones(condition.states.shape[:2], dtype=torch.bool, device=noisy.device)
        prediction: Tensor = self.network(
            hidden_states=noisy,
            timestep=1 - timesteps / self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=condition.states,
            encoder_attention_mask=mask,
        ).sample
        return -prediction
