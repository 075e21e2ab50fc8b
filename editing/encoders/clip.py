"""A CLIP text encoder that can be run layer by layer, with access to the keys of its fc2 matrices.

Shapes: p prompts, s positions, d width, m MLP width.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editing.condition import Condition
from editing.errors import UnsupportedPipeline
from editing.families.layout import choose_default_layers
from editing.prompts import PromptTokenizer


@dataclass(frozen=True)
class Encoding:
    """The output of a text encoder for p prompts."""

    states: Tensor
    """(p, s, d): what the U-Net reads at every position. Of SDXL the states before the last layer, not normalized."""
    pooled_output: Tensor
    """(p, ·): the state at EOS after the last layer and the final norm, projected if the encoder has a projection.
    This is E_eos of Eq. 2, and the pooled output of SDXL's second encoder."""


def join_encodings(encodings: Sequence[Encoding]) -> Condition:
    """Join the outputs of the pipeline's encoders, in order, for the same prompts: side by side."""
    states = torch.cat([encoding.states for encoding in encodings], dim=-1)
    return Condition(states, pooled=encodings[-1].pooled_output if len(encodings) > 1 else None)


class EditableEncoder:
    """A CLIP text encoder that can start and stop at any layer.

    Modules are found by structure: `CLIPTextModel` contains a `text_model` before transformers 5.6 and none after. A
    layer is pre-norm: `attend` gives the residual stream after attention and the keys k that fc2 reads, and the
    layer's output is that stream plus fc2(k).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PromptTokenizer,
        *,
        name: str = "text_encoder",
        folder: Path | None = None,
        family: str = "sd1",
    ) -> None:
        body: Any = getattr(model, "text_model", model)
        try:
            self.embeddings: nn.Module = body.embeddings
            self.layers: nn.ModuleList = body.encoder.layers
            self.final_norm: nn.Module = body.final_layer_norm
            first = self._block(0)
            _ = first.self_attn, first.layer_norm1, first.layer_norm2, first.mlp.fc1, first.mlp.activation_fn
            self.width: int = first.mlp.fc2.out_features
            self.mlp_width: int = first.mlp.fc2.in_features
        except (AttributeError, IndexError) as error:
            raise UnsupportedPipeline(f"a {type(model).__name__} is no CLIP text encoder") from error
        self.projection: nn.Linear | None = getattr(model, "text_projection", None)
        self.family = family
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.folder = folder
        """The folder of the component's weights. An export needs it."""
        parameters = inspect.signature(first.self_attn.forward).parameters
        self._mask_argument = "causal_attention_mask" if "causal_attention_mask" in parameters else "attention_mask"

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def pooled_dim(self) -> int:
        """The width of the pooled output."""
        return self.width if self.projection is None else self.projection.out_features

    @property
    def value_layer(self) -> int:
        """L, the last layer edited by default.

        It is the last but one. An edit of the last layer would change its output at the subject's own position only,
        and SDXL's U-Net does not read that layer at all.
        """
        return self.n_layers - 2

    @property
    def default_edited_layers(self) -> tuple[int, ...]:
        return choose_default_layers(self.family, self.name, last=self.value_layer)

    @property
    def device(self) -> torch.device:
        return self.fc2(0).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc2(0).weight.dtype

    def fc2(self, layer: int) -> nn.Linear:
        """Return the matrix that an edit changes: it maps keys (m,) to values (d,)."""
        linear: nn.Linear = self._block(layer).mlp.fc2
        return linear

    def _block(self, layer: int) -> Any:
        return self.layers[layer]

    def double(self) -> "EditableEncoder":
        """Copy the encoder with its layers in float64. It shares the embeddings with the original."""
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers).double()
        twin.final_norm = copy.deepcopy(self.final_norm).double()
        twin.projection = copy.deepcopy(self.projection).double() if self.projection else None
        return twin

    def pad_ids(self, prompts: Sequence[tuple[int, ...]], *, full_length: bool = True) -> Tensor:
        """Return token ids (p, s), padded to the length that inference reads or to the longest prompt."""
        padded = [self.tokenizer.pad(prompt) for prompt in prompts]
        length = self.tokenizer.max_length if full_length else max(len(prompt) for prompt in prompts)
        return torch.tensor(padded, device=self.device)[:, :length]

    def embed(self, ids: Tensor) -> Tensor:
        """Return the states before layer 0, (p, s, d), of token ids (p, s)."""
        states: Tensor = self.embeddings(input_ids=ids)
        return states.to(self.dtype)

    def attend(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention (p, s, d) and the keys (p, s, m)."""
        block = self._block(layer)
        s = states.shape[1]
        # Causal mask only: inference masks no padding, and the states at padding positions reach the U-Net.
        mask = torch.full((s, s), torch.finfo(states.dtype).min, dtype=states.dtype, device=states.device).triu(1)
        mask = mask.expand(len(states), 1, s, s)
        attention = block.self_attn(hidden_states=block.layer_norm1(states), **{self._mask_argument: mask})[0]
        stream: Tensor = states + attention
        keys: Tensor = block.mlp.activation_fn(block.mlp.fc1(block.layer_norm2(stream)))
        return stream, keys

    def run_layers(self, states: Tensor, *, start: int, stop: int) -> Tensor:
        """Run layers start … stop-1 on the states before `start`, (p, s, d) to (p, s, d)."""
        for layer in range(start, stop):
            stream, keys = self.attend(layer, states)
            states = stream + self.fc2(layer)(keys)
        return states

    def normalize(self, states: Tensor) -> Tensor:
        """Apply the final layer norm, (p, s, d) to (p, s, d)."""
        normed: Tensor = self.final_norm(states)
        return normed

    def encode_from(self, states: Tensor, *, start: int, ends: Tensor) -> Encoding:
        """Run the layers from `start` on the states (p, s, d) before it; `ends` (p,) are the positions of EOS."""
        last = self.n_layers - 1
        penultimate = self.run_layers(states, start=start, stop=last)
        normed = self.normalize(self.run_layers(penultimate, start=max(start, last), stop=self.n_layers))
        pooled = normed[torch.arange(len(ends), device=ends.device), ends]  # (p, d)
        if self.projection is not None:
            pooled = self.projection(pooled)
        return Encoding(penultimate if self.family == "sdxl" else normed, pooled)

    def encode(self, prompts: Sequence[tuple[int, ...]], *, full_length: bool = True) -> Encoding:
        """Encode the token ids of prompts, by default at the full length that inference reads."""
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return self.encode_from(self.embed(self.pad_ids(prompts, full_length=full_length)), start=0, ends=ends)
