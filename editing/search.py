"""One δ being looked for, and the prompts in which it acts. The mechanics of stage I; the loop is in `values`.

Shapes: e searches in a batch, p prompts (all templates of all searches), s positions, d width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from editing.concepts import ConceptEdit, ReferenceImages
from editing.errors import EditingError, InvalidEdit
from editing.noise import DestinationNoise, NoiseSource, ReferenceNoise
from editing.pipelines import EditablePipeline
from editing.prompts import SubjectPosition, TokenizedPrompt, destination_prompts, validate_edit

_WINDOW = 3  # steps over which the loss must fall


@dataclass(eq=False)
class Search:
    """The search for one δ: an edit, or one prompt of a balance."""

    index: int
    edit: ConceptEdit
    share: float
    layer: int
    positions: list[SubjectPosition]
    """One for each template."""
    destinations: list[TokenizedPrompt]
    """The same for the destination; none for reference images."""
    delta: Tensor
    """(d,) float32: as far as it has come."""
    hidden: Tensor
    """(d,) float32"""
    step: int = 0
    """Steps done."""
    prompts: "PromptBatch | None" = None
    """Its own, while it runs or is about to."""
    noise: NoiseSource | None = None
    losses: list[float] = field(default_factory=list)
    """Per step, the whole loss."""
    converged: bool = False
    """Whether nothing lowers the loss any more."""
    text_losses: list[float] = field(default_factory=list)
    noise_losses: list[float] = field(default_factory=list)
    error: EditingError | None = None

    @property
    def uses_text(self) -> bool:
        return self.edit.objective != "noise"

    @property
    def text_weight(self) -> float:
        return {"text": 1.0, "noise": 0.0, "hybrid": self.edit.settings.text_weight}[self.edit.objective]

    @property
    def text_steps(self) -> int:
        """How many steps, the first, need no U-Net."""
        settings = self.edit.settings
        warm = min(settings.warm_start, settings.steps * 4 // 5)
        return {"text": settings.steps, "noise": 0, "hybrid": warm}[self.edit.objective]

    @property
    def settled(self) -> bool:
        """Whether its last steps together lowered the loss by less than its tolerance."""
        losses = self.losses
        return len(losses) > _WINDOW and losses[-1 - _WINDOW] - losses[-1] < self.edit.settings.tolerance * losses[0]

    def prepare(self, pipeline: EditablePipeline) -> None:
        """Draw what the noise loss compares, from the edit's seed."""
        settings, generator = self.edit.settings, Generator().manual_seed(self.edit.settings.seed)
        if self.edit.objective == "text":
            return
        if isinstance(self.edit.destination, ReferenceImages):
            images, templates = self.edit.destination.images, len(self.positions)
            self.noise = ReferenceNoise(pipeline, images, templates=templates, settings=settings, generator=generator)
        else:
            self.noise = DestinationNoise(pipeline, self.destinations, settings=settings, generator=generator)

    def release(self) -> None:
        """Let go of what only a running search needs, which is the bulk of the memory."""
        self.prompts = self.noise = None


def searches_of(edit: ConceptEdit, pipeline: EditablePipeline, *, index: int) -> list[Search]:
    """The searches of one edit, the call's `index`-th. Raises `InvalidEdit` where a prompt cannot be placed."""
    tokenizer = pipeline.tokenizer
    validate_edit(edit, tokenizer)
    encoder = pipeline.encoder
    layer = encoder.value_layer if edit.settings.layer is None else edit.settings.layer
    if layer > encoder.value_layer:
        raise InvalidEdit(f"layer must be at most {encoder.value_layer}, the last but one", pointer="/settings/layer")
    positions = [tokenizer.locate(template, edit.source) for template in edit.templates]
    by_template = [destination_prompts(edit.destination, template) for template in edit.templates]
    shares = list(by_template[0].values()) or [1.0]
    columns = list(zip(*by_template, strict=True)) or [()]  # one for each prompt of a balance, one for anything else
    return [
        Search(
            index=index,
            edit=edit,
            share=share,
            layer=layer,
            positions=positions,
            destinations=[tokenizer.encode(prompt) for prompt in prompts],
            delta=torch.zeros(encoder.width, device=encoder.device),
            hidden=torch.zeros(encoder.width, device=encoder.device),
        )
        for share, prompts in zip(shares, columns, strict=True)
    ]


class PromptBatch:
    """The source prompts of the searches that share a step, with their states after layer L.

    The states are computed once for a search: `split` gives each its own, and `join` puts those that run together.
    """

    _PER_SEARCH = ("hidden", "text_weights", "_decay", "_limit")
    _PER_PROMPT = ("_states", "_subject", "_eos", "_targets")

    def __init__(
        self, pipeline: EditablePipeline, searches: Sequence[Search], *, full_length: bool | None = None
    ) -> None:
        """`full_length`: with the padding, which the U-Net reads too; by default where any of the searches needs it."""
        self._encoder = encoder = pipeline.encoder
        self._layer = searches[0].layer
        device = encoder.device
        positions = [position for search in searches for position in search.positions]
        settings = [search.edit.settings for search in searches]
        if full_length is None:
            full_length = any(search.edit.objective != "text" for search in searches)
        self._index([len(search.positions) for search in searches])

        self._subject = torch.tensor([position.last_subject_index for position in positions], device=device)
        self._eos = torch.tensor([position.eos_index for position in positions], device=device)
        with torch.no_grad():
            ids = encoder.ids([position.ids for position in positions], full_length=full_length)
            self._states = encoder.advance(encoder.embed(ids), start=0, stop=self._layer + 1)  # (p, s, d)
        self.hidden = self._mean(self._states[self._prompt, self._subject].float())
        """h (e, d) float32, the mean over the templates."""

        self.text_weights = torch.tensor([search.text_weight for search in searches], device=device)  # (e,)
        self._decay = torch.tensor([setting.weight_decay for setting in settings], device=device)
        self._limit = self.hidden.norm(dim=1) * torch.tensor([setting.clamp for setting in settings], device=device)
        self._targets = torch.zeros(len(positions), encoder.width, device=device)  # (p, d)
        destinations = [destination for search in searches if search.uses_text for destination in search.destinations]
        if destinations:
            with torch.no_grad():
                said = encoder.encode([destination.ids for destination in destinations], full_length=False)
            ends = torch.tensor([destination.eos_index for destination in destinations], device=device)
            self._targets[self.text_weights[self._row] > 0] = said[torch.arange(len(ends), device=device), ends].float()

    def split(self) -> list["PromptBatch"]:
        """One for each search."""
        parts = []
        for row, (first, count) in enumerate(zip(self.first.tolist(), self._counts, strict=True)):
            part = copy.copy(self)
            part._index([count])
            for name in self._PER_SEARCH:
                setattr(part, name, getattr(self, name)[row : row + 1])
            for name in self._PER_PROMPT:
                setattr(part, name, getattr(self, name)[first : first + count])
            parts.append(part)
        return parts

    @classmethod
    def join(cls, batches: Sequence["PromptBatch"]) -> "PromptBatch":
        """The searches of batches of one layer, in order. Shorter prompts are padded: attention does not look ahead."""
        whole = copy.copy(batches[0])
        whole._index([count for batch in batches for count in batch._counts])
        for name in cls._PER_SEARCH + cls._PER_PROMPT:
            entries = [getattr(batch, name) for batch in batches]
            if name == "_states":
                longest = max(states.shape[1] for states in entries)
                entries = [F.pad(states, (0, 0, 0, longest - states.shape[1])) for states in entries]
            setattr(whole, name, torch.cat(entries))
        return whole

    def _index(self, counts: list[int]) -> None:
        """Which search each prompt belongs to, from the number of prompts of each search."""
        device = self._encoder.device
        self._counts = counts
        number = torch.tensor(counts, device=device)
        self.first = torch.tensor([0, *counts[:-1]], device=device).cumsum(0)  # (e,): each search's first prompt
        self._row = torch.arange(len(counts), device=device).repeat_interleave(number)
        self._share = 1 / number[self._row]  # (p,)
        self._prompt = torch.arange(len(self._row), device=device)

    def context(self, deltas: Tensor) -> Tensor:
        """What the U-Net reads with δ (e, d) in place, (p, s, d)."""
        shift = deltas[self._row].to(self._states.dtype)
        states = self._states.index_put((self._prompt, self._subject), shift, accumulate=True)
        encoder = self._encoder
        return encoder.finish(encoder.advance(states, start=self._layer + 1, stop=encoder.n_layers))

    def text_losses(self, context: Tensor) -> Tensor:
        """L_txt (e,), Eq. 2: the mean square at EOS; 0 where a search has no text loss."""
        said = context[self._prompt, self._eos].float()  # (p, d)
        losses = self._mean((said - self._targets).square().mean(1))
        return torch.where(self.text_weights > 0, losses, torch.zeros_like(losses))

    def regulariser(self, deltas: Tensor) -> Tensor:
        """weight_decay · ‖δ‖²/‖h‖² (e,)"""
        return self._decay * deltas.square().sum(1) / self.hidden.square().sum(1)

    def clamp(self, deltas: Tensor) -> Tensor:
        """δ (e, d), each no longer than its edit's `clamp` times ‖h‖."""
        shrink = self._limit / deltas.norm(dim=1).clamp_min(1e-12)
        return deltas * shrink.clamp(max=1)[:, None]

    def _mean(self, rows: Tensor) -> Tensor:
        """(p, ·) to the mean over each search's templates, (e, ·)."""
        share = self._share.view(-1, *[1] * (rows.ndim - 1))
        return rows.new_zeros(len(self.first), *rows.shape[1:]).index_add(0, self._row, rows * share)
