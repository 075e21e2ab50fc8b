"""CLIP text encoders: their output matrices are the fc2 matrices.

Shapes: p prompts, s positions, d width, m width of the keys.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from editing.encoders.base import Block, Context, SharedPrefix, TextEncoder
from editing.errors import UnsupportedPipeline


class ClipBlock(Block):
    """A pre-norm block with an MLP of two matrices."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        _ = layer.layer_norm1, layer.layer_norm2, layer.mlp.fc1, layer.mlp.activation_fn
        parameters = inspect.signature(layer.self_attn.forward).parameters
        # The name before transformers 5.
        self._mask_argument = "causal_attention_mask" if "causal_attention_mask" in parameters else "attention_mask"

    @property
    def output_matrix(self) -> nn.Linear:
        linear: nn.Linear = self.layer.mlp.fc2
        return linear

    def attend(self, states: Tensor, context: Context) -> Tensor:
        normed = self.layer.layer_norm1(states)
        attention: Tensor = self.layer.self_attn(hidden_states=normed, **{self._mask_argument: context["mask"]})[0]
        return states + attention

    def keys(self, stream: Tensor) -> Tensor:
        mlp = self.layer.mlp
        keys: Tensor = mlp.activation_fn(mlp.fc1(self.layer.layer_norm2(stream)))
        return keys


class ClipEncoder(TextEncoder):
    """A CLIP text encoder.

    `CLIPTextModel` contains a `text_model` before transformers 5.6 and none after.
    """

    is_causal = True
    key = "encoder.layers.{}.mlp.fc2.weight"

    def _find_blocks(self) -> Sequence[Block]:
        body: Any = getattr(self.model, "text_model", self.model)
        try:
            self.embeddings: nn.Module = body.embeddings
            self.final_norm: nn.Module = body.final_layer_norm
            blocks = [ClipBlock(layer) for layer in body.encoder.layers]
            _ = blocks[0].output_matrix
        except (AttributeError, IndexError) as error:
            raise UnsupportedPipeline(f"a {type(self.model).__name__} is no CLIP text encoder") from error
        self.projection: nn.Linear | None = getattr(self.model, "text_projection", None)
        return blocks

    @property
    def pooled_dim(self) -> int:
        """The width of the pooled output."""
        return self.width if self.projection is None else self.projection.out_features

    @property
    def objective_widths(self) -> tuple[int, ...]:
        return (self.pooled_dim,)

    def double(self) -> Self:
        twin = super().double()
        twin.projection = copy.deepcopy(self.projection).double() if self.projection else None
        return twin

    def build_contexts(
        self,
        states: Tensor,
        *,
        mask: Tensor | None = None,  # noqa: ARG002
        prefix: SharedPrefix | None = None,  # noqa: ARG002
    ) -> Sequence[Context]:
        # Causal mask only: inference masks no padding, and the states at padding positions reach the U-Net.
        p, s, _ = states.shape
        causal = torch.full((s, s), torch.finfo(states.dtype).min, dtype=states.dtype, device=states.device).triu(1)
        return [{"mask": causal.expand(p, 1, s, s)}] * self.n_layers

    def pool(self, normed: Tensor, ends: Tensor) -> Tensor:
        """Return the state at EOS, projected if the encoder has a projection."""
        pooled = normed[torch.arange(len(ends), device=ends.device), ends]  # (p, d)
        return pooled if self.projection is None else self.projection(pooled)
