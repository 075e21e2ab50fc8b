"""The transformer of Qwen-Image."""

from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from editing.condition import Condition
from editing.generators.flow import FlowTransformer, pack, unpack


class QwenImage(FlowTransformer):
    """Takes t / 1000, packed latents with their shape, and a mask."""

    network_class = QwenImageTransformer2DModel
    text_projection = "txt_in"
    sample_size_of = "autoencoder"

    def normalize_text(self, states: Tensor) -> Tensor:
        normed: Tensor = self.network.txt_norm(states)
        return normed

    def guide(self, unguided: Tensor, guided: Tensor, *, guidance_scale: float) -> Tensor:
        """Combine the predictions, and give each token the norm that it has with the prompt."""
        _, _, height, width = guided.shape
        combined = pack(super().guide(unguided, guided, guidance_scale=guidance_scale))  # (b, n, 4c)
        norms = pack(guided).norm(dim=-1, keepdim=True)
        return unpack(combined * (norms / combined.norm(dim=-1, keepdim=True)), height=height, width=width)

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        _, _, height, width = noisy.shape
        tokens = self.network(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=condition.states,
            encoder_hidden_states_mask=condition.mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
        ).sample
        return unpack(tokens, height=height, width=width)
