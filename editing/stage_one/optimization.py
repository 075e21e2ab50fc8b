"""The optimization of one δ: what it optimizes, its state between steps, and when L-BFGS starts again.

Shapes: D the sum of the encoders' widths d. An optimization has a δ for each encoder of the pipeline, side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from editing.edits import ConceptEdit, ReferenceImages
from editing.errors import EditingError, InvalidEdit
from editing.pipelines import EditablePipeline
from editing.prompts import PromptTokenizer, SubjectPosition, build_destination_prompts, check_subjects
from editing.stage_one.noise import DestinationNoise, NoiseSource, ReferenceNoise, draw_destinations
from editing.stage_one.targets import Compared
from editing.stage_two.conflicts import list_destination_names

_WINDOW = 3  # steps over which the loss must fall
_INITIAL_STEPS = (1.0, 0.3, 0.1)  # of L-BFGS, in units of ‖h‖: a stalled optimization restarts with the next one
_STALLED = 0.1  # an optimization has stalled if more than this share of its first loss is left


@dataclass(eq=False)
class Optimization:
    """The optimization of one δ: that of an edit, or of one prompt of a balance."""

    index: int
    """Of the edit in the call."""
    edit: ConceptEdit
    share: float
    """F_a, the share of this prompt in a balance; 1 for any other edit."""
    layers: tuple[int, ...]
    """L of each encoder."""
    positions: tuple[tuple[SubjectPosition, ...], ...]
    """The source prompts: for each encoder one for each template."""
    destinations: list[str]
    """The destination prompt of each template; none for reference images."""
    compared: tuple[tuple[Compared, ...], ...]
    """The same prompts as tokens, for each encoder."""
    widths: tuple[int, ...]
    """d of each encoder."""
    delta: Tensor
    """δ (D,) float32 after the steps so far."""
    hidden: Tensor
    """h (D,) float32"""
    step: int = 0
    """Number of steps done."""
    restarts: int = 0
    """How often it has restarted."""
    best: tuple[float, float, Tensor] | None = None
    """The best end of the starts before this one: loss, text loss and δ."""
    noise: NoiseSource | None = None
    """Present while steps with the noise loss run."""
    losses: list[float] = field(default_factory=list)
    """The whole loss at each accepted point of this start."""
    at_minimum: bool = False
    """Whether L-BFGS can lower the loss no further."""
    text_losses: list[float] = field(default_factory=list)
    noise_losses: list[float] = field(default_factory=list)
    error: EditingError | None = None

    @property
    def uses_text(self) -> bool:
        return self.edit.objective != "noise"

    def compare(self, encoder: int) -> list[Compared | None]:
        """Return what each source prompt is compared with in the text loss, in the encoder of this number."""
        return [*self.compared[encoder]] if self.uses_text else [None] * len(self.edit.templates)

    @property
    def text_weight(self) -> float:
        """Weight of L_txt in the loss of the next step: λ_s of Eq. 6 for a hybrid edit.

        If λ_s is 0, the warm-up uses L_txt alone and the other steps do without it.
        """
        hybrid = self.edit.settings.text_weight or float(self.step < self.text_steps)
        return {"text": 1.0, "noise": 0.0, "hybrid": hybrid}[self.edit.objective]

    @property
    def text_steps(self) -> int:
        """Number of first steps that use the text loss alone and need no U-Net."""
        settings = self.edit.settings
        warmup_steps = min(settings.warmup_steps, settings.optimization_steps * 4 // 5)
        return {"text": settings.optimization_steps, "noise": 0, "hybrid": warmup_steps}[self.edit.objective]

    @property
    def converged(self) -> bool:
        """Whether further text steps would lower the loss by less than the tolerance.

        A tolerance of 0 never ends Adam: its loss rises now and then.
        """
        losses, tolerance = self.losses, self.edit.settings.tolerance
        if self.at_minimum:
            return True
        return 0 < tolerance and len(losses) > _WINDOW and losses[-1 - _WINDOW] - losses[-1] < tolerance * losses[0]

    @property
    def initial_step(self) -> Tensor:
        """Length of the first step of L-BFGS, a scalar."""
        return self.hidden.norm() * _INITIAL_STEPS[self.restarts]

    @property
    def stalled(self) -> bool:
        """Whether L-BFGS ended with most of its first loss left, and a shorter first step may do better.

        A long first step can jump over the slope onto a plateau, where the gradient does not lead down.
        """
        can_restart = self.edit.settings.text_optimizer == "lbfgs" and self.restarts + 1 < len(_INITIAL_STEPS)
        return can_restart and self.losses[-1] > _STALLED * self.losses[0]

    def restart(self) -> None:
        """Start again: from δ = 0 if it has stalled, else from its δ. Remember the best end so far."""
        if self.stalled:
            if self.best is None or self.losses[-1] < self.best[0]:
                self.best = self.losses[-1], self.text_losses[-1], self.delta
            self.restarts += 1
            self.delta = torch.zeros_like(self.delta)
        self.losses, self.at_minimum = [], False

    def take_best(self) -> None:
        """Set δ to the best end of all starts."""
        if self.best and self.losses and self.best[0] < self.losses[-1]:
            _, text_loss, self.delta = self.best
            self.text_losses.append(text_loss)
        self.best = None


def draw_noise(pipeline: EditablePipeline, optimizations: Sequence[Optimization]) -> None:
    """Draw what the noise loss of each compares, from its edit's seed. A damaged reference image is its error."""
    prompted: list[tuple[Optimization, torch.Generator]] = []
    for each in optimizations:
        settings, generator = each.edit.settings, torch.Generator().manual_seed(each.edit.settings.seed)
        if isinstance(each.edit.destination, ReferenceImages):
            images, templates = each.edit.destination.images, len(each.edit.templates)
            try:
                each.noise = ReferenceNoise(
                    pipeline, images, templates=templates, settings=settings, generator=generator
                )
            except EditingError as error:
                each.error = error
        elif each.edit.objective != "text":
            prompted.append((each, generator))
    wanted = [(each.destinations, each.edit.settings, generator) for each, generator in prompted]
    for (each, generator), latents in zip(prompted, draw_destinations(pipeline, wanted), strict=True):
        settings = each.edit.settings
        each.noise = DestinationNoise(
            pipeline, each.destinations, latents=latents, settings=settings, generator=generator
        )


def build_optimizations(
    edit: ConceptEdit, pipeline: EditablePipeline, *, index: int, layers: Mapping[str, int] = MappingProxyType({})
) -> list[Optimization]:
    """Return the optimizations of an edit: one for each prompt of a balance, one for any other edit.

    `index` is the edit's in the call, `layers` has L of encoders by name. Raises `InvalidEdit` if a tokenizer cannot
    take one of its prompts.
    """
    for encoder in pipeline.encoders:
        check_subjects(edit, encoder.tokenizer)
    chosen = _choose_layers(edit, pipeline, layers)
    positions = tuple(
        tuple(encoder.tokenizer.locate(template, edit.source) for template in edit.templates)
        for encoder in pipeline.encoders
    )
    widths = tuple(encoder.width for encoder in pipeline.encoders)
    by_template = [build_destination_prompts(edit.destination, template) for template in edit.templates]
    shares = list(by_template[0].values()) or [1.0]
    by_destination = list(zip(*by_template, strict=True)) or [()]  # the prompts of each destination, by template
    names = list_destination_names(edit.destination) or ("",)
    return [
        Optimization(
            index=index,
            edit=edit,
            share=share,
            layers=chosen,
            positions=positions,
            destinations=list(prompts),
            compared=tuple(_compare(encoder.tokenizer, edit.templates, prompts, name) for encoder in pipeline.encoders),
            widths=widths,
            delta=torch.zeros(sum(widths), device=pipeline.device),
            hidden=torch.zeros(sum(widths), device=pipeline.device),
        )
        for share, prompts, name in zip(shares, by_destination, names, strict=True)
    ]


def _compare(
    tokenizer: PromptTokenizer, templates: Sequence[str], prompts: Sequence[str], name: str
) -> tuple[Compared, ...]:
    """Return the destination prompts of the templates, with the last token of the destination's name in each."""
    return tuple(
        Compared(tokenizer.encode(prompt), tokenizer.find_last_token(template, name))
        for template, prompt in zip(templates, prompts, strict=bool(prompts))
    )


def _choose_layers(edit: ConceptEdit, pipeline: EditablePipeline, layers: Mapping[str, int]) -> tuple[int, ...]:
    """Return L of each encoder: the edit's own, that of `layers`, or the default. Raises `InvalidEdit`."""
    layer, encoders = edit.settings.layer, pipeline.encoders
    if layer is None:
        for encoder in encoders:
            if layers.get(encoder.name, 0) > encoder.last_value_layer:
                raise InvalidEdit(f"the layer of {encoder.name} must be at most {encoder.last_value_layer}")
        return tuple(layers.get(encoder.name, encoder.value_layer) for encoder in encoders)
    if len(encoders) > 1:
        raise InvalidEdit(
            "one layer cannot fit the several text encoders of this pipeline: leave it out",
            pointer="/settings/layer",
        )
    last = encoders[0].last_value_layer
    if layer > last:
        which = "the last but one" if last == encoders[0].n_layers - 2 else "the last that the generator's text follows"
        raise InvalidEdit(f"layer must be at most {last}, {which}, not {layer}", pointer="/settings/layer")
    return (layer,)
