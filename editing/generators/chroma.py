"""The transformer of Chroma."""

import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer, pack, unpack
from editing.generators.flux import build_positions


class Chroma(FlowTransformer):
    """Takes t / 1000, packed latents with their positions, and a mask over text and latents.

    diffusers 0.42 gives the mask as numbers, which attention adds to its scores: padding is read too, but less.
    """

    network_class = ChromaTransformer2DModel
    text_projection = "context_embedder"
    sample_size_of = "autoencoder"

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        _, _, height, width = noisy.shape
        tokens = pack(noisy)
        mask = None
        if condition.mask is not None:
            mask = torch.cat([condition.mask.to(noisy.dtype), noisy.new_ones(tokens.shape[:2])], dim=1)
        tokens = self.network(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            encoder_hidden_states=condition.states,
            txt_ids=torch.zeros(condition.states.shape[1], 3, device=noisy.device),
            img_ids=build_positions(height // 2, width // 2, device=noisy.device),
            attention_mask=mask,
        ).sample
        return unpack(tokens, height=height, width=width)
