"""Other methods for the same edits, for comparison. Each is a `editing.evaluation.method.Method`.

All are written from their papers' equations. They refuse reference images, which have no prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from editing.edits import ConceptEdit
from editing.errors import UnsupportedPipeline
from editing.evaluation.method import Progress
from editing.families.conditions import encode_with_origins
from editing.pipelines import EditablePipeline
from editing.restore import restore_weights
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import apply_update, compute_update
from editing.uce.alignment import align_prompts
from editing.uce.projections import apply_temporarily, compute_projection_update


@dataclass(frozen=True)
class CrossAttention:
    """UCE (Gandikota et al., 2023): the U-Net's cross-attention in closed form, all edits at once."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `compute_projection_update`. Its defaults are those of UCE's released code."""

    @contextmanager
    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> Iterator[None]:
        update = compute_projection_update(pipeline, edits, progress=progress, **self.settings)
        with apply_temporarily(pipeline.generator, update):
            yield


@dataclass(frozen=True)
class SingleLayer:
    """In the manner of ReFACT (Arad et al., 2023, arXiv 2306.00738): one MLP of the text encoder, one edit at a time.

    For each edit, Adam optimizes δ on the encoder as edited so far, so that the source's end-of-text state approaches
    the destination's in squared distance. The layer then takes ROME's update of rank one, with which the source's key
    gives that value exactly: ΔW = δ (C0⁻¹ k)ᵀ / (kᵀ C0⁻¹ k). Layer 9, 100 steps at 0.05 and ‖δ‖ ≤ 4 ‖h‖ are the
    settings of its code on TIMED. Its contrast with other prompts, which only bounds the distance, is left out. An
    encoder with fewer layers is edited at its last editable one. SDXL's two encoders, for which the paper names no
    layer, are refused.
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
        progress: Progress | None = None,
    ) -> Iterator[None]:
        if len(pipeline.encoders) > 1:
            raise UnsupportedPipeline("ReFACT edits one layer of one text encoder: this pipeline has several")
        encoder = pipeline.encoder
        layer = min(self.layer, encoder.value_layer)
        factors = FactoredMoments(second_moments, encoder=encoder.name)
        with restore_weights([encoder.output_matrix(layer).weight]):
            for done, edit in enumerate(edits, start=1):
                edit = replace(edit, settings=replace(edit.settings, **self.stage_one, layer=layer))
                values = optimize_values(pipeline, [edit])
                # Eq. 5 with next to no weight on other keys: the value is met exactly, along C0⁻¹ k.
                update = compute_update(
                    encoder, [edit], values, factors, layers=[layer], alpha=1 - 1e-6, moment_weight=1.0
                )
                apply_update(encoder, update)
                if progress:
                    progress(done, len(edits))
            yield


@dataclass(frozen=True)
class FineTuning:
    """The control: Adam trains all MLPs of the text encoder until sources give the states of their destinations.

    The loss is the mean squared difference of the states that the U-Net reads, over the positions of
    `editing.uce.alignment`. Only the small steps preserve other concepts. The run's seed chooses the prompts of a step.
    """

    steps: int = 300
    batch: int = 16
    """Prompts of a step, of all edits and templates."""
    learning_rate: float = 1e-4

    @contextmanager
    def __call__(
        self,
        pipeline: EditablePipeline,
        edits: Sequence[ConceptEdit],
        second_moments: SecondMoments,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> Iterator[None]:
        parameters = [
            parameter
            for encoder in pipeline.encoders
            for block in encoder.blocks
            for name, parameter in block.layer.named_parameters()
            if name.startswith("mlp.")
        ]
        prompts = [
            aligned
            for index, edit in enumerate(edits)
            for aligned in align_prompts(edit, pipeline.encoders, pointer=f"/edits/{index}")
        ]
        positions, targets = [], []  # (t,) and (t, d) of each template
        with torch.no_grad():
            for own in prompts:
                condition, origins = encode_with_origins(pipeline.encoders, own.prompts)
                first, *others = own.find_positions(origins)
                aligned = [states[chosen] for states, chosen in zip(condition.states[1:], others, strict=True)]
                positions.append(first)
                targets.append(own.average_destinations(aligned))
        generator = torch.Generator().manual_seed(seed)
        with restore_weights(parameters):
            try:
                optimizer = torch.optim.Adam([own.requires_grad_(True) for own in parameters], lr=self.learning_rate)
                for step in range(1, self.steps + 1 if prompts else 1):
                    chosen = torch.randperm(len(prompts), generator=generator)[: self.batch].tolist()
                    states = pipeline.encode([prompts[i].source for i in chosen]).states
                    losses = [mse_loss(own[positions[i]], targets[i]) for i, own in zip(chosen, states, strict=True)]
                    optimizer.zero_grad()
                    torch.stack(losses).mean().backward()
                    optimizer.step()
                    if progress:
                        progress(step, self.steps)
            finally:
                _freeze(parameters)
            yield


def _freeze(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
