"""The transformer for editing: one forward pass for all captions and latents of a batch, which have one size here."""

from torch import Tensor
from torch.nn import functional as F

from demo.llm.transformer import CAPTION_LENGTH, Captions, predict_velocity
from editing.condition import Condition
from editing.generators.z_image import ZImage
from editing.pipelines import EditablePipeline


class FixedSizeZImage(ZImage):
    """The same predictions as `ZImage`, without the lists in which the module takes latents and captions one by one."""

    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return ε - x₀ (b, 4, 8, 8). Raises ValueError for a caption of more than 32 tokens."""
        states, mask = condition.states, condition.mask
        if states.shape[1] > CAPTION_LENGTH:
            raise ValueError(f"a caption has {states.shape[1]} tokens; at most {CAPTION_LENGTH} are trained on")
        lengths = states.new_full((len(states),), states.shape[1]) if mask is None else mask.sum(1)
        padded = F.pad(states, (0, 0, 0, CAPTION_LENGTH - states.shape[1]))
        return -predict_velocity(self.network, noisy, timesteps / 1000, Captions(padded, lengths))


def use_fixed_size(pipeline: EditablePipeline) -> EditablePipeline:
    """Replace the generator by one of a fixed size, with the same weights. Returns the pipeline."""
    whole = pipeline.generator
    assert isinstance(whole, ZImage)
    pipeline.generator = FixedSizeZImage(
        whole.network, whole.autoencoder, whole.scheduler, image_size=whole.image_size, index=whole.index
    )
    return pipeline
