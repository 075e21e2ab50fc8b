"""The transformer of FLUX.2 [klein]."""

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer


class Flux2Klein(FlowTransformer):
    """Takes t / 1000 and latents as tokens with their positions. The autoencoder has already folded 2 by 2 latents."""

    network_class = Flux2Transformer2DModel
    text_projection = "context_embedder"
    sample_size_of = "autoencoder"

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 1.0 and not self.index.get("is_distilled", False)

    def count_tokens(self) -> int:
        _, height, width = self.latent_shape
        return height * width

    def compute_mu(self, num_inference_steps: int = 50) -> float:
        """Return the logarithm of the shift, which diffusers fits to the number of tokens and of steps."""
        n = self.count_tokens()
        at_200_steps = 0.00016927 * n + 0.45666666
        if n > 4300:
            return at_200_steps
        at_10_steps = 8.73809524e-05 * n + 1.89833333
        return at_200_steps + (at_200_steps - at_10_steps) / 190 * (num_inference_steps - 200)

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        _, _, height, width = noisy.shape
        zero, device = torch.arange(1), noisy.device
        prediction = self.network(
            hidden_states=noisy.flatten(2).transpose(1, 2),  # (b, n, c)
            timestep=timesteps / 1000,
            guidance=None,
            encoder_hidden_states=condition.states,
            txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(condition.states.shape[1])).to(device),
            img_ids=torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero).to(device),
        ).sample
        unpacked: Tensor = prediction.transpose(1, 2).unflatten(2, (height, width))
        return unpacked
