"""One view of a CLIP text encoder: its states layer by layer, and the keys of its fc2 memories."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editing.errors import UnsupportedPipeline
from editing.prompts import PromptTokenizer


class EditableEncoder:
    """A text encoder that can be entered and left at any layer.

    Modules are found by structure, since `CLIPTextModel` has a `text_model` inside in transformers before 5.6 and
    none after. A layer is pre-norm: `attend` gives the residual stream after attention and the keys `k` that fc2
    reads; the layer's output is that stream plus `fc2(k)`.

    Shapes: p prompts, s positions, d width, m MLP width.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PromptTokenizer, *, name: str = "text_encoder", folder: Path | None = None
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
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.folder = folder
        """The component's folder, where the weights came from; needed to export them."""
        parameters = inspect.signature(first.self_attn.forward).parameters
        self._mask_argument = "causal_attention_mask" if "causal_attention_mask" in parameters else "attention_mask"

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def value_layer(self) -> int:
        """L, the last layer edited by default. The very last one is left out: of its output only what is at the
        subject's own position would change."""
        return self.n_layers - 2

    @property
    def default_edited_layers(self) -> tuple[int, ...]:
        return tuple(range(self.value_layer + 1))

    @property
    def device(self) -> torch.device:
        return self.fc2(0).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc2(0).weight.dtype

    def fc2(self, layer: int) -> nn.Linear:
        linear: nn.Linear = self._block(layer).mlp.fc2
        return linear

    def _block(self, layer: int) -> Any:
        return self.layers[layer]

    def double(self) -> "EditableEncoder":
        """The same encoder with its layers copied to float64; the original and its embeddings are left alone."""
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers).double()
        twin.final_norm = copy.deepcopy(self.final_norm).double()
        return twin

    def ids(self, prompts: Sequence[tuple[int, ...]], *, full_length: bool = True) -> Tensor:
        """Token ids (p, s), padded to what inference reads, or only to the longest."""
        padded = [self.tokenizer.pad(prompt) for prompt in prompts]
        length = self.tokenizer.max_length if full_length else max(len(prompt) for prompt in prompts)
        return torch.tensor(padded, device=self.device)[:, :length]

    def embed(self, ids: Tensor) -> Tensor:
        """(p, s) to the states before layer 0, (p, s, d)."""
        states: Tensor = self.embeddings(input_ids=ids)
        return states.to(self.dtype)

    def attend(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after attention (p, s, d), and the keys (p, s, m)."""
        block = self._block(layer)
        s = states.shape[1]
        mask = torch.full((s, s), torch.finfo(states.dtype).min, dtype=states.dtype, device=states.device).triu(1)
        mask = mask.expand(len(states), 1, s, s)
        attention = block.self_attn(hidden_states=block.layer_norm1(states), **{self._mask_argument: mask})[0]
        stream: Tensor = states + attention
        keys: Tensor = block.mlp.activation_fn(block.mlp.fc1(block.layer_norm2(stream)))
        return stream, keys

    def advance(self, states: Tensor, *, start: int, stop: int) -> Tensor:
        """Run layers start … stop-1 on the states before `start`, (p, s, d) to (p, s, d)."""
        for layer in range(start, stop):
            stream, keys = self.attend(layer, states)
            states = stream + self.fc2(layer)(keys)
        return states

    def finish(self, states: Tensor) -> Tensor:
        """The final layer norm: what the U-Net of SD 1.x reads, (p, s, d)."""
        normed: Tensor = self.final_norm(states)
        return normed

    def encode(self, prompts: Sequence[tuple[int, ...]], *, full_length: bool = True) -> Tensor:
        """Token ids of prompts to what the U-Net reads, (p, s, d): the full length, with no mask."""
        ids = self.ids(prompts, full_length=full_length)
        return self.finish(self.advance(self.embed(ids), start=0, stop=self.n_layers))
