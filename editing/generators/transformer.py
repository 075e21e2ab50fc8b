"""What the transformers of all families share: one projection reads the text, and a family's conventions are its class.

Shapes: b latents; c, h, w their channels, height and width; o outputs of a projection, D width of the states.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from editing.condition import Condition
from editing.generators.autoencoder import Autoencoder
from editing.generators.generator import Generator


class Transformer(Generator):
    """A transformer. A subclass says how its family calls it."""

    network_class: ClassVar[type[Any]]
    text_projection: ClassVar[str]
    """The name in the network of the first matrix that reads the condition's states."""
    sample_size_of: ClassVar[str] = "network"
    """Whose `sample_size` is the size of pictures: in latents of the `network`, or in pixels of the `autoencoder`."""

    def __init__(self, *parts: Any, index: Mapping[str, Any], **options: Any) -> None:
        super().__init__(*parts, **options)
        self.index = index
        """The pipeline's `model_index.json`, which has settings of some families."""

    @classmethod
    def choose_image_size(cls, network: Any, autoencoder: Autoencoder, autoencoder_config: dict[str, Any]) -> int:
        """Return the height and width in pixels of the pictures that the pipeline draws by default."""
        if cls.sample_size_of == "network":
            return int(network.config.sample_size * autoencoder.downscale)
        return int(autoencoder_config.get("sample_size", 1024))

    @property
    def text_projections(self) -> Mapping[str, nn.Linear]:
        """The first matrix (o, D) that reads the condition's states."""
        return {self.text_projection: self.network.get_submodule(self.text_projection)}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        condition = condition.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return self.call_network(noisy.to(dtype), timesteps, condition).float()

    @abstractmethod
    def call_network(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the prediction (b, c, h, w), with latents and condition in the network's dtype."""
