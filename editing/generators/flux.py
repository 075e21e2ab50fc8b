"""The transformer of FLUX.1."""

import copy

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer, pack, unpack


class Flux(FlowTransformer):
    """Takes t / 1000, packed latents with their positions, CLIP's pooled output, and guidance as a number.

    FLUX.1 [dev] is distilled: its guidance is an input and not a second prediction. FLUX.1 [schnell] has none.
    """

    network_class = FluxTransformer2DModel
    text_projection = "context_embedder"
    sample_size_of = "autoencoder"
    embedded_guidance = 3.5
    """The input of a distilled network: diffusers' default outside `sample`, which replaces it by its own."""

    def is_guided(self, guidance_scale: float) -> bool:  # noqa: ARG002
        return False

    def embed_guidance(self, guidance_scale: float) -> "Flux":
        drawing = copy.copy(self)
        drawing.embedded_guidance = guidance_scale
        return drawing

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        _, _, height, width = noisy.shape
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(noisy),), self.embedded_guidance, device=noisy.device)
        tokens = self.network(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=condition.pooled,
            encoder_hidden_states=condition.states,
            txt_ids=torch.zeros(condition.states.shape[1], 3, device=noisy.device),
            img_ids=build_positions(height // 2, width // 2, device=noisy.device),
        ).sample
        return unpack(tokens, height=height, width=width)


def build_positions(height: int, width: int, *, device: torch.device) -> Tensor:
    """Return the positions (n, 3) of packed latents: 0, row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(device, torch.float32)
