"""The transformer of AuraFlow."""

from typing import ClassVar

from diffusers import AuraFlowTransformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer


class AuraFlow(FlowTransformer):
    """Takes t / 1000. It has no mask: the condition's states are 0 where the prompt is padded."""

    network_class = AuraFlowTransformer2DModel
    text_projection = "context_embedder"
    sample_size_of = "autoencoder"  # the network's own is half of what the pipeline draws
    passes_sigmas: ClassVar[bool] = False

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = self.network(
            noisy, encoder_hidden_states=condition.states, timestep=(timesteps / 1000).to(noisy.dtype)
        ).sample
        return prediction
