"""Stage II: write the values of all edits into the fc2 memories of many layers at once, in closed form.

Everything here is float64. The published code scales C0 in float32 before it solves, which alone moves ΔW by up to
5e-4; and a solution that is exact to rounding gives the same float16 weights whatever the order of summation.

Shapes: n edits, c columns (edits, then preserved prompts), p prompts, d width, m MLP width.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from editing.concepts import ConceptEdit
from editing.encoders import EditableEncoder
from editing.errors import EditingError, InvalidEdit, SingularSecondMoment
from editing.prompts import SubjectPosition
from editing.statistics import FactoredMoments, SecondMoments, cholesky, condition_number
from editing.values import Value

ResidualMode = Literal["spread", "even", "published"]

_CHUNK = 256  # prompts advanced at a time: bounds the keys held, (256, s, m)
_SAME_KEY = 0.98


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW = B Aᵀ of one layer's fc2.weight, of rank n at most."""

    layer: int
    b: Tensor
    """(d, n) float64: the residuals."""
    a: Tensor
    """(m, n) float64: what picks each edit's residual out of a key."""
    condition: float
    """Condition number of the system solved: (c, c) by Woodbury, (m, m) with as many columns as the keys are wide."""
    moment_condition: float | None
    """Condition number of the second moments; None where they did not need to be inverted."""
    relative_norm: float
    """‖ΔW‖ / ‖W‖, Frobenius."""

    def dense(self) -> Tensor:
        """ΔW (d, m) float64."""
        return self.b @ self.a.T


@dataclass(frozen=True)
class Conflict:
    """Two edits, by their position in the call, that pull at one memory."""

    kind: Literal["same source", "source is a destination", "same key"]
    edits: tuple[int, int]
    cosine: float | None = None
    """For "same key": the smallest cosine of their keys over the edited layers."""


@dataclass(frozen=True)
class Update:
    """What stage II found. Nothing has been changed yet: see `applied`, `apply_update` and `editing.weights`."""

    encoder: str
    layers: Mapping[int, LayerUpdate]
    residuals: tuple[float, ...]
    """Per edit, in the caller's order: ‖z - h_L after‖ / ‖δ‖. 0 is an edit met exactly, 1 one not begun."""
    conflicts: tuple[Conflict, ...]

    def dense(self, layer: int) -> Tensor:
        """ΔW (d, m) float64 of one layer."""
        return self.layers[layer].dense()


@torch.no_grad()
def compute_update(
    encoder: EditableEncoder,
    edits: Sequence[ConceptEdit],
    values: Sequence[Value | EditingError],
    second_moments: SecondMoments | FactoredMoments,
    *,
    alpha: float = 0.5,
    mass: float = 4000.0,
    layers: Sequence[int] | None = None,
    residual: ResidualMode = "spread",
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Update:
    """ΔW of Eq. 14 for every edited layer in ascending order, each on the weights as edited so far.

        ΔW = α R Kᵀ [(1-α) C0 + α K Kᵀ]⁻¹,   C0 = mass · E[k kᵀ]

    `alpha` in (0, 1) weighs the edits against what the encoder knows. `preserve` are prompts whose last token is to
    keep its value: their keys join C0 with `preserve_weight` each (an edit's key weighs one). Layers default to all
    that the values were optimised for, as far as L (of SDXL the last of them only), and must end at L.

    The encoder's weights are never touched. The result is a function of the *set* of edits: they are put in an order
    of their own, so that the same set gives the same bits in any order on the same platform, and a set with one edit
    taken away gives the bits of a set that never had it. `progress(done, layers)` is called after each layer.

    `values` are what `optimize_values` gave; an error among them is raised. Of a pipeline with several encoders each
    has an update of its own, from the same values and second moments: what is this encoder's in them is used.
    Pass `FactoredMoments` to keep the factorisation, which serves every α and mass, between calls.
    """
    found = [_expect(value, encoder, index) for index, value in enumerate(values)]
    factored = (
        second_moments
        if isinstance(second_moments, FactoredMoments)
        else FactoredMoments(second_moments.of(encoder.name))
    )
    layers = encoder.default_edited_layers if layers is None else tuple(sorted(set(layers)))
    _check_arguments(encoder, edits, found, alpha=alpha, mass=mass, layers=layers, residual=residual)
    if not preserve_weight > 0:
        raise InvalidEdit("preserve_weight must be above 0", pointer="/preserve_weight")
    order = sorted(range(len(edits)), key=lambda i: _identity(edits[i], found[i]))
    conflicts = _declared_conflicts(edits)
    if not edits:
        return Update(encoder.name, {}, (), conflicts)

    exact = encoder.double()
    delta = torch.stack([found[i].delta for i in order], 1).to(encoder.device, torch.float64)  # (d, n)
    hidden = torch.stack([found[i].hidden for i in order], 1).to(encoder.device, torch.float64)
    z = hidden + delta
    n, q = len(order), len(layers)
    prefixes = _Prefixes(exact, [edits[i] for i in order], sorted(set(preserve)))
    weights = torch.full((prefixes.columns,), alpha, dtype=torch.float64, device=encoder.device)  # (c,)
    weights[n:] = (1 - alpha) * preserve_weight

    updates: dict[int, LayerUpdate] = {}
    cosines = torch.ones(n, n, dtype=torch.float64, device=encoder.device)
    for done, layer in enumerate(layers):
        prefixes.advance_to(layer)
        keys = prefixes.keys()  # (m, c)
        if residual == "spread":
            r = (z - prefixes.hidden_after(layers[-1])[:, :n]) / (q - done)
        elif residual == "even":
            r = delta / q
        else:
            r = (z - prefixes.memory_output()[:, :n]) / (q - done)  # what the released code does
        a, condition = _solve(factored, layer, keys, weights, alpha=alpha, mass=mass)
        dense = r @ a[:, :n].T  # (d, m)
        weight = exact.fc2(layer).weight
        updates[layer] = LayerUpdate(
            layer,
            b=r.cpu(),
            a=a[:, :n].cpu(),
            condition=condition,
            moment_condition=factored.condition(layer) if prefixes.columns < encoder.mlp_width else None,
            relative_norm=float(dense.norm() / weight.norm()),
        )
        weight += dense  # of the float64 copy
        unit = torch.nn.functional.normalize(keys[:, :n], dim=0)
        cosines = torch.minimum(cosines, unit.T @ unit)
        if progress:
            progress(done + 1, q)

    prefixes.advance_to(layers[-1] + 1)
    left = (z - prefixes.states_at_subject()[:, :n]).norm(dim=0) / delta.norm(dim=0).clamp_min(1e-12)
    residuals = [0.0] * n
    for position, index in enumerate(order):
        residuals[index] = float(left[position])
    pairs = (cosines.triu(1) >= _SAME_KEY).nonzero().tolist()
    conflicts += tuple(
        Conflict("same key", _ordered(order[i], order[j]), cosine=float(cosines[i, j]))
        for i, j in pairs
        if edits[order[i]].source != edits[order[j]].source
    )
    return Update(encoder.name, updates, tuple(residuals), conflicts)


@torch.no_grad()
def apply_update(encoder: EditableEncoder, update: Update) -> None:
    """Add ΔW to the encoder's weights in memory, rounding once to their dtype."""
    for layer, change in update.layers.items():
        weight = encoder.fc2(layer).weight
        weight.copy_(weight.double() + change.dense().to(weight.device))


@contextmanager
def applied(encoder: EditableEncoder, update: Update) -> Iterator[EditableEncoder]:
    """The encoder with the update in place; on leaving, its weights are what they were, bit for bit."""
    before = {layer: encoder.fc2(layer).weight.detach().clone() for layer in update.layers}
    try:
        apply_update(encoder, update)
        yield encoder
    finally:
        with torch.no_grad():
            for layer, weight in before.items():
                encoder.fc2(layer).weight.copy_(weight)


class _Prefixes:
    """The states of every prompt up to its last subject token, carried through the encoder layer by layer.

    Attention is causal, so nothing after that token matters. A column is the mean over an edit's templates, or one
    preserved prompt.
    """

    def __init__(self, encoder: EditableEncoder, edits: Sequence[ConceptEdit], preserve: Sequence[str]) -> None:
        tokenizer = encoder.tokenizer
        groups = [[tokenizer.locate(template, edit.source) for template in edit.templates] for edit in edits]
        groups += [[tokenizer.locate("{}", prompt, pointer="/preserve")] for prompt in preserve]
        self.columns = len(groups)
        self._encoder = encoder
        self._layer = 0
        self._column = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=encoder.device)
        self._share = torch.tensor([1 / len(group) for group in groups for _ in group], device=encoder.device).double()
        self._chunks = []
        prompts: list[SubjectPosition] = [position for group in groups for position in group]
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start : start + _CHUNK]
            last = torch.tensor([position.last_subject_index for position in chunk], device=encoder.device)
            states = encoder.embed(encoder.ids([position.prefix for position in chunk], full_length=False))
            self._chunks.append((states, last))

    def advance_to(self, layer: int) -> None:
        """Make the states those before `layer`, with the weights as they are now."""
        self._chunks = [
            (self._encoder.advance(states, start=self._layer, stop=layer), last) for states, last in self._chunks
        ]
        self._layer = layer

    def keys(self) -> Tensor:
        """(m, c) at the current layer."""
        return self._mean(lambda states: self._encoder.attend(self._layer, states)[1])

    def memory_output(self) -> Tensor:
        """What fc2 of the current layer gives, bias included, (d, c)."""
        fc2 = self._encoder.fc2(self._layer)
        return self._mean(lambda states: fc2(self._encoder.attend(self._layer, states)[1]))

    def hidden_after(self, layer: int) -> Tensor:
        """The states after `layer`, with the weights as they are now, (d, c)."""
        return self._mean(lambda states: self._encoder.advance(states, start=self._layer, stop=layer + 1))

    def states_at_subject(self) -> Tensor:
        """(d, c)"""
        return self._mean(lambda states: states)

    def _mean(self, read: Callable[[Tensor], Tensor]) -> Tensor:
        rows = torch.cat([read(states)[torch.arange(len(last)), last] for states, last in self._chunks])  # (p, ·)
        means = torch.zeros(self.columns, rows.shape[1], dtype=rows.dtype, device=rows.device)
        return means.index_add_(0, self._column, rows * self._share[:, None]).T


def _solve(
    factored: FactoredMoments, layer: int, keys: Tensor, weights: Tensor, *, alpha: float, mass: float
) -> tuple[Tensor, float]:
    """A = [A0 + K diag(w) Kᵀ]⁻¹ K diag(w), (m, c), with A0 = (1-α) mass E[k kᵀ]; and the condition number.

    With fewer columns than the keys are wide, by Woodbury: with X = A0⁻¹ K, A = X (diag(1/w) + Kᵀ X)⁻¹.
    """
    m, c = keys.shape
    scale = (1 - alpha) * mass
    if c < m:
        x = factored.solve(layer, keys) / scale  # (m, c)
        system = torch.diag(1 / weights) + keys.T @ x  # (c, c)
    else:
        system = scale * factored.moment(layer).to(keys.device) + (keys * weights) @ keys.T  # (m, m)
    factor = cholesky(system)
    if factor is None:
        raise SingularSecondMoment(
            f"the system of layer {layer} has no solution: estimate second moments over more captions"
        )
    a = torch.cholesky_solve(x.T, factor).T if c < m else torch.cholesky_solve(keys * weights, factor)
    return a, condition_number(system, factor)


def _expect(outcome: Value | EditingError, encoder: EditableEncoder, index: int) -> Value:
    if isinstance(outcome, EditingError):
        raise outcome
    for part in outcome.parts:
        if part.encoder == encoder.name and part.delta.shape == (encoder.width,):
            return part
    raise InvalidEdit("the value was made for another text encoder", pointer=f"/edits/{index}")


def _identity(edit: ConceptEdit, value: Value) -> tuple[str, tuple[str, ...], bytes]:
    return edit.source, edit.templates, value.to_bytes()


def _declared_conflicts(edits: Sequence[ConceptEdit]) -> tuple[Conflict, ...]:
    """Conflicts that the words alone show."""
    by_source: dict[str, list[int]] = {}
    for index, edit in enumerate(edits):
        by_source.setdefault(edit.source.strip().casefold(), []).append(index)
    conflicts = [Conflict("same source", (first, other)) for first, *others in by_source.values() for other in others]
    for index, edit in enumerate(edits):
        for prompt in _destination_names(edit):
            for other in by_source.get(prompt.strip().casefold(), ()):
                if other != index:
                    conflicts.append(Conflict("source is a destination", (other, index)))
    return tuple(conflicts)


def _destination_names(edit: ConceptEdit) -> tuple[str, ...]:
    destination = edit.destination
    return (
        (prompt,)
        if (prompt := getattr(destination, "prompt", None) or getattr(destination, "neutral", None))
        else tuple(getattr(destination, "weights", ()))
    )


def _ordered(first: int, second: int) -> tuple[int, int]:
    return min(first, second), max(first, second)


def _check_arguments(
    encoder: EditableEncoder,
    edits: Sequence[ConceptEdit],
    values: Sequence[Value],
    *,
    alpha: float,
    mass: float,
    layers: tuple[int, ...],
    residual: str,
) -> None:
    if not 0 < alpha < 1:
        raise InvalidEdit(f"alpha must lie between 0 and 1, both excluded, not {alpha}", pointer="/alpha")
    if not (mass > 0 and math.isfinite(mass)):
        raise InvalidEdit(f"mass must be a finite number above 0, not {mass}", pointer="/mass")
    if residual not in ("spread", "even", "published"):
        raise InvalidEdit(f'residual must be "spread", "even" or "published", not {residual!r}', pointer="/residual")
    if len(edits) != len(values):
        raise InvalidEdit(f"{len(edits)} edits with {len(values)} values: each needs its own", pointer="/edits")
    if not layers or layers[0] < 0 or layers[-1] >= encoder.n_layers:
        raise InvalidEdit(f"layers must be among 0 … {encoder.n_layers - 1}", pointer="/layers")
    for index, value in enumerate(values):
        if value.layer != layers[-1]:
            raise InvalidEdit(
                f"the value was optimised for layer {value.layer}, so that layer must be the last edited, "
                f"not {layers[-1]}",
                pointer="/layers",
            )
        if not (value.delta.isfinite().all() and value.hidden.isfinite().all()):
            raise InvalidEdit("the value is not finite", pointer=f"/edits/{index}")
