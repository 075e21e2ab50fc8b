"""T5 and UMT5 text encoders: their output matrices are the `wo` matrices, without biases.

Attention is bidirectional: a token's states depend on all tokens, and on the padding unless it is masked.

Shapes: p prompts, s positions, d width, m width of the keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from editing.encoders.base import Block, Context, SharedPrefix, TextEncoder
from editing.errors import UnsupportedPipeline


class T5Block(Block):
    """A pre-norm block with a gated or a plain MLP."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._is_gated = hasattr(self._mlp, "wi_0")
        _ = self.attention.q, self._mlp.wo, self._mlp.act, self._mlp.wi_0 if self._is_gated else self._mlp.wi

    @property
    def attention(self) -> Any:
        return self.layer.layer[0].SelfAttention

    @property
    def _mlp(self) -> Any:
        return self.layer.layer[-1].DenseReluDense

    @property
    def output_matrix(self) -> nn.Linear:
        linear: nn.Linear = self._mlp.wo
        return linear

    def attend(self, states: Tensor, context: Context) -> Tensor:
        stream: Tensor = self.layer.layer[0](states, **context)[0]
        return stream

    def keys(self, stream: Tensor) -> Tensor:
        mlp, normed = self._mlp, self.layer.layer[-1].layer_norm(stream)
        keys: Tensor = mlp.act(mlp.wi_0(normed)) * mlp.wi_1(normed) if self._is_gated else mlp.act(mlp.wi(normed))
        return keys.to(mlp.wo.weight.dtype)  # transformers keeps `wo` in float32


class T5Encoder(TextEncoder):
    """A T5 or UMT5 encoder. T5's relative position bias is that of block 0; UMT5 has one in each block."""

    is_causal = False
    key = "block.{}.layer.1.DenseReluDense.wo.weight"

    def _find_blocks(self) -> Sequence[Block]:
        body: Any = getattr(self.model, "encoder", self.model)
        try:
            self.embeddings: nn.Module = body.embed_tokens
            self.final_norm: nn.Module = body.final_layer_norm
            blocks = [T5Block(layer) for layer in body.block]
            self._shares_bias = not all(block.attention.has_relative_attention_bias for block in blocks[1:])
        except (AttributeError, IndexError) as error:
            raise UnsupportedPipeline(f"a {type(self.model).__name__} is no T5 text encoder") from error
        self._config = body.config
        return blocks

    def build_contexts(
        self,
        states: Tensor,
        *,
        mask: Tensor | None = None,
        prefix: SharedPrefix | None = None,  # noqa: ARG002
    ) -> Sequence[Context]:
        context: dict[str, Any] = {
            "attention_mask": create_bidirectional_mask(
                config=self._config, inputs_embeds=states, attention_mask=mask if self.spec.is_masked else None
            )
        }
        if self._shares_bias:
            attention = self.blocks[0].layer.layer[0].SelfAttention
            length = states.shape[1]
            with torch.no_grad():
                bias = attention.compute_bias(length, length, device=states.device)  # (1, heads, s, s)
            context["position_bias"] = bias.to(states.dtype)
        return [context] * self.n_layers
