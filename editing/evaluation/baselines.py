"""What others do with the same edits, for comparison. Each follows `editing.evaluation.methods.Method`.

All are written from their papers' equations. A destination without words, reference images, is none of theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from editing.edits import ConceptEdit
from editing.errors import UnsupportedPipeline
from editing.pipelines import EditablePipeline
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import apply_update, compute_update
from editing.uce.alignment import align_prompts
from editing.uce.cross_attention import apply_temporarily, compute_cross_attention_update

if TYPE_CHECKING:
    from editing.evaluation.methods import Progress


@dataclass(frozen=True)
class CrossAttention:
    """UCE (Gandikota et al., 2023): the U-Net's cross-attention in closed form, all edits at once."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `compute_cross_attention_update`; its defaults are those of UCE's released code."""

    @contextmanager
    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: "Progress | None" = None,
    ) -> Iterator[None]:
        update = compute_cross_attention_update(pipeline, edits, progress=progress, **self.settings)
        with apply_temporarily(pipeline.unet, update):
            yield


@dataclass(frozen=True)
class SingleLayer:
    """In the manner of ReFACT (Arad et al., 2023, arXiv 2306.00738): one MLP of the text encoder, one edit at a time.

    For each edit δ is sought by Adam on the encoder as edited so far, so that the source's end-of-text state comes near
    to the destination's in squared distance; then the layer takes the update of rank one that makes the source's key
    give it exactly, ΔW = δ (C0⁻¹ k)ᵀ / (kᵀ C0⁻¹ k), ROME's. Layer 9, 100 steps at 0.05 and ‖δ‖ ≤ 4 ‖h‖ are what its
    code was run with on TIMED; its contrast with other prompts, which bounds the distance rather than lowering it, is
    left out. An encoder of fewer layers is edited at the last that may be; SDXL's pair, for which the paper names no
    layer, is refused.
    """

    layer: int = 9
    stage_one: Mapping[str, Any] = field(
        default_factory=lambda: {
            "objective": "text", "text_optimizer": "adam", "learning_rate": 0.05,
            "optimization_steps": 100, "max_delta_norm": 4.0,
        }
    )  # fmt: skip
    """Fields of `StageOneSettings` that replace those of each edit."""

    @contextmanager
    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: "Progress | None" = None,
    ) -> Iterator[None]:
        if len(pipeline.encoders) > 1:
            raise UnsupportedPipeline("ReFACT edits one layer of one text encoder: this pipeline has several")
        encoder = pipeline.encoder
        layer = min(self.layer, encoder.value_layer)
        factored = FactoredMoments(second_moments, encoder=encoder.name)
        with _restored(list(encoder.fc2(layer).parameters())):
            for done, edit in enumerate(edits, start=1):
                edit = replace(edit, settings=replace(edit.settings, **self.stage_one, layer=layer))
                values = optimize_values(pipeline, [edit])
                # Eq. 14 with next to no weight on what else is known: met exactly, along C0⁻¹ k
                update = compute_update(
                    encoder, [edit], values, factored, layers=[layer], alpha=1 - 1e-6, moment_weight=1.0
                )
                apply_update(encoder, update)
                if progress:
                    progress(done, len(edits))
            yield


@dataclass(frozen=True)
class FineTuning:
    """The control: all MLPs of the text encoder, trained by Adam until sources read as their destinations did.

    The loss is the mean squared difference of the states that the U-Net reads, over the positions of
    `editing.uce.alignment`; nothing is preserved but by the small steps. The run's seed says which prompts a step sees.
    """

    steps: int = 300
    batch: int = 16
    """Prompts a step, of all edits and templates."""
    learning_rate: float = 1e-4

    @contextmanager
    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: "Progress | None" = None,
    ) -> Iterator[None]:
        parameters = [
            parameter
            for encoder in pipeline.encoders
            for name, parameter in encoder.layers.named_parameters()
            if ".mlp." in name
        ]
        prompts = [
            aligned
            for index, edit in enumerate(edits)
            for aligned in align_prompts(edit, pipeline.tokenizer, pointer=f"/edits/{index}")
        ]
        with torch.no_grad():
            wanted = [own.of_destination(list(pipeline.encode(own.destinations).states)) for own in prompts]
        generator = torch.Generator().manual_seed(seed)
        with _restored(parameters):
            optimizer = torch.optim.Adam([own.requires_grad_(True) for own in parameters], lr=self.learning_rate)
            for step in range(1, self.steps + 1 if prompts else 1):
                chosen = torch.randperm(len(prompts), generator=generator)[: self.batch].tolist()
                states = pipeline.encode([prompts[i].source for i in chosen]).states
                losses = [mse_loss(prompts[i].of_source(own), wanted[i]) for i, own in zip(chosen, states, strict=True)]
                optimizer.zero_grad()
                torch.stack(losses).mean().backward()
                optimizer.step()
                if progress:
                    progress(step, self.steps)
            _frozen(parameters)
            yield


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """On leaving, the parameters are what they were, bit for bit, and take no gradient."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        _frozen(parameters)
        with torch.no_grad():
            for parameter, was in zip(parameters, before, strict=True):
                parameter.copy_(was)


def _frozen(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
