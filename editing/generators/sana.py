"""The transformer of Sana."""

from typing import ClassVar

from diffusers import SanaTransformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer


class Sana(FlowTransformer):
    """Takes t on a scale of its own, and a mask."""

    network_class = SanaTransformer2DModel
    text_projection = "caption_projection.linear_1"
    passes_sigmas: ClassVar[bool] = False

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = self.network(
            noisy,
            encoder_hidden_states=condition.states,
            encoder_attention_mask=condition.mask,
            timestep=timesteps * self.network.config.timestep_scale,
        ).sample
        return prediction[:, : noisy.shape[1]]  # without a learned variance
