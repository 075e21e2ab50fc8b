"""Decoder-only language models as text encoders: their output matrices are the `down_proj` matrices.

Llama, Qwen 2 and 3, the language models of Qwen2.5-VL and Qwen3-VL, Mistral and SmolLM have pre-norm blocks; Gemma 2
has norms before and after both attention and MLP. Masks and rotary embeddings are those that the library's own model
makes.

Shapes: p prompts, s positions, d width, m width of the keys.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from editing.encoders.base import Block, Context, SharedPrefix, TextEncoder
from editing.errors import UnsupportedPipeline


class DecoderBlock(Block):
    """A pre-norm block with a gated MLP."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        _ = layer.self_attn, layer.input_layernorm, self._mlp_norm, layer.mlp.gate_proj, layer.mlp.up_proj
        _ = layer.mlp.act_fn

    @property
    def output_matrix(self) -> nn.Linear:
        linear: nn.Linear = self.layer.mlp.down_proj
        return linear

    @property
    def _mlp_norm(self) -> Any:
        return self.layer.post_attention_layernorm

    def attend(self, states: Tensor, context: Context) -> Tensor:
        return states + self._run_attention(states, context)

    def _run_attention(self, states: Tensor, context: Context) -> Tensor:
        attention: Tensor = self.layer.self_attn(hidden_states=self.layer.input_layernorm(states), **context)[0]
        return attention

    def keys(self, stream: Tensor) -> Tensor:
        mlp, normed = self.layer.mlp, self._mlp_norm(stream)
        keys: Tensor = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        return keys


class SandwichBlock(DecoderBlock):
    """A block that also normalizes what attention and MLP give to the residual stream, as in Gemma 2."""

    @property
    def _mlp_norm(self) -> Any:
        return self.layer.pre_feedforward_layernorm

    def attend(self, states: Tensor, context: Context) -> Tensor:
        attention: Tensor = self.layer.post_attention_layernorm(self._run_attention(states, context))
        return states + attention

    def add(self, stream: Tensor, output: Tensor) -> Tensor:
        normed: Tensor = self.layer.post_feedforward_layernorm(output)
        return stream + normed

    def pull_back(self, output: Tensor, change: Tensor) -> Tensor:
        """Return the change that turns the matrix's output into the direction that the norm maps to the wanted sum.

        The norm is n(y) = g ⊙ y / rms(y) with a gain g. It keeps the direction of y / g only, so the length of y stays:
        n(y + Δ) ∝ n(y) + change. A change along n(y) itself cannot be reached.
        """
        norm = self.layer.post_feedforward_layernorm
        gain = norm(torch.ones_like(output))  # g, up to the norm's epsilon
        wanted = (norm(output) + change) / gain  # y / rms(y) after the change, up to its length
        rms = wanted.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        length = output.square().mean(-1, keepdim=True).sqrt()
        return wanted * (length / rms) - output


class DecoderEncoder(TextEncoder):
    """A decoder-only language model. Attention is causal and leaves out the padding."""

    is_causal = True
    key = "layers.{}.mlp.down_proj.weight"

    def _find_blocks(self) -> Sequence[Block]:
        try:
            self._body = _find_body(self.model)
            self.embeddings: nn.Module = self._body.embed_tokens
            self.final_norm: nn.Module = self._body.norm
            kind = SandwichBlock if hasattr(self._body.layers[0], "pre_feedforward_layernorm") else DecoderBlock
            blocks = [kind(layer) for layer in self._body.layers]
            _ = blocks[0].output_matrix
        except (AttributeError, IndexError) as error:
            raise UnsupportedPipeline(
                f"a {type(self.model).__name__} is no decoder-only language model with gated MLPs"
            ) from error
        return blocks

    def build_contexts(
        self,
        states: Tensor,
        *,
        mask: Tensor | None = None,
        prefix: SharedPrefix | None = None,
        positions: Tensor | None = None,
    ) -> Sequence[Context]:
        """Return the context of each block, as in `TextEncoder`.

        Also takes a mask (p, 1, s, s) to add to the attention's scores, and positions (p, s). The library's model runs
        with recorders in place of its blocks, which keep what it passes to them.
        """
        if prefix is not None:
            return self._build_contexts_after(prefix, states, mask=mask)
        recorders = [_Recorder(layer) for layer in self._body.layers]
        twin = copy.copy(self._body)
        twin._modules = {**self._body._modules, "layers": nn.ModuleList(recorders), "norm": nn.Identity()}
        with torch.no_grad():
            twin(inputs_embeds=states.detach(), attention_mask=mask, position_ids=positions, use_cache=False)
        return [recorder.context for recorder in recorders]

    def _build_contexts_after(self, prefix: SharedPrefix, states: Tensor, *, mask: Tensor | None) -> Sequence[Context]:
        """Return the contexts of the tokens after a prefix: they see it, and among themselves those before."""
        p, s, _ = states.shape
        before = torch.ones(s, s, dtype=torch.bool, device=states.device).tril().expand(p, s, s)
        if mask is not None:
            before = before & mask[:, None]
        sees = torch.cat([before.new_ones(p, s, prefix.length), before], dim=2)  # (p, s, prefix + s)
        added = torch.zeros(sees.shape, dtype=states.dtype, device=states.device)
        added.masked_fill_(~sees, torch.finfo(states.dtype).min)
        positions = torch.arange(prefix.length, prefix.length + s, device=states.device).expand(p, s)
        contexts = self.build_contexts(states, mask=added[:, None], positions=positions)
        return [{**own, **seen} for own, seen in zip(contexts, prefix.contexts, strict=True)]

    def run_prefix(self, states: Tensor, *, start: int) -> SharedPrefix | None:
        own = states[:1, : self.tokenizer.prefix_length]  # (1, prefix, d)
        if not own.shape[1] or self.tokenizer.pads_left:
            return None
        caches = [_PrefixCache() for _ in self.blocks]
        contexts = [
            {**context, "past_key_values": cache}
            for context, cache in zip(self.build_contexts(own), caches, strict=True)
        ]
        mask = torch.ones(own.shape[:2], dtype=torch.bool, device=own.device)
        encoding = self.encode_from(own, start=start, mask=mask, ends=mask.sum(1) - 1, contexts=contexts)
        return SharedPrefix(encoding, [{"past_key_values": cache} for cache in caches])


class _PrefixCache:
    """The keys and values of a block's attention at a prefix, in the place of the library's cache.

    The first call keeps those that it gets. Later calls put them before those of other tokens.
    """

    def __init__(self) -> None:
        self._prefix: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (p, heads, s, head_dim) of the attention and return those that it sees."""
        if self._prefix is None:
            self._prefix = key_states, value_states
            return self._prefix
        keys, values = (tensor.expand(len(key_states), -1, -1, -1) for tensor in self._prefix)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


class _Recorder(nn.Module):
    """Keeps the keyword arguments of a block and returns the states as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.context: dict[str, Any] = {}
        for name in ("attention_type", "layer_type"):  # which mask the model chooses for it
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        self.context = context
        return hidden_states


def _find_body(model: nn.Module) -> Any:
    """Return the module with the embeddings, the blocks and the final norm. Raises AttributeError."""
    for path in ("", "model", "language_model", "model.language_model", "language_model.model"):
        try:
            body = model.get_submodule(path)
        except AttributeError:
            continue
        if all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
            return body
    raise AttributeError("no decoder")
