"""The transformer of Stable Diffusion 3 and 3.5."""

from typing import ClassVar

from diffusers import SD3Transformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer


class StableDiffusion3(FlowTransformer):
    """Takes t itself, and the pooled output of both CLIP encoders beside it."""

    network_class = SD3Transformer2DModel
    text_projection = "context_embedder"
    passes_sigmas: ClassVar[bool] = False

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = self.network(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition.states,
            pooled_projections=condition.pooled,
        ).sample
        return prediction
