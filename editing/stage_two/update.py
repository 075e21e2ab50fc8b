"""Stage II: write the values of all edits into the fc2 memories of many layers at once, in closed form.

Keys and solves are float64. The published code scales C0 in float32 before it solves, which alone moves ΔW by up to
5e-4; and a solution that is exact to rounding gives the same float16 weights whatever the order of summation.

Shapes: e edits, n columns that they ask for (one each, or one a context), c all columns (theirs, then of preserved
prompts), N nodes of the tree of prompts, d width, m MLP width.

Beyond the encoder, and the factors where they are kept in memory, this holds four (N, d) and three (m, c) float64, the
keys (N, m) where the tree is small, one layer in float64, (e, e) cosines in float32, three (m, m) where c reaches m,
and the result, at most (d + m)·d a layer.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from editing.edits import ConceptEdit
from editing.encoders.clip import EditableEncoder
from editing.errors import EditingError, InvalidEdit, SingularSecondMoment
from editing.families.layout import choose_default_layers
from editing.second_moments.factors import FactoredMoments, estimate_condition_number, factorize
from editing.second_moments.moments import SecondMoments
from editing.stage_two.conflicts import Conflict, find_declared_conflicts, list_destination_names
from editing.stage_two.contexts import AT_SUBJECT, KEPT, WEIGHT, Contexts, around, surroundings
from editing.stage_two.prefixes import PrefixTree, recall
from editing.values import EditValue, EncoderValue

ResidualSchedule = Literal["spread", "even", "published"]

_SAME_KEY = 0.98
_COSINES = 512  # rows of cosines computed at a time: (512, n)


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW = B Aᵀ of one layer's fc2.weight, of rank r = min(n, d)."""

    layer: int
    b: Tensor
    """(d, r) float64: the residuals; with more columns than the states are wide, the identity."""
    a: Tensor
    """(m, r) float64: what picks each column's residual out of a key; with more than that, ΔWᵀ."""
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

    def describe_layers(self) -> list[dict[str, Any]]:
        """Return for each edited layer its relative norm and condition number."""
        return [
            {
                "encoder": self.encoder,
                "layer": layer,
                "relative_norm": change.relative_norm,
                "condition": change.condition,
            }
            for layer, change in self.layers.items()
        ]


@torch.no_grad()
def compute_update(
    encoder: EditableEncoder,
    edits: Sequence[ConceptEdit],
    values: Sequence[EditValue | EditingError],
    second_moments: SecondMoments | FactoredMoments,
    *,
    alpha: float = 0.5,
    moment_weight: float = 1000.0,
    layers: Sequence[int] | None = None,
    residual_schedule: ResidualSchedule = "spread",
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    contexts: Contexts = "own",
    progress: Callable[[int, int], None] | None = None,
) -> Update:
    """ΔW of Eq. 14 for every edited layer in ascending order, each on the weights as edited so far.

        ΔW = α R Kᵀ [(1-α) C0 + α K Kᵀ]⁻¹,   C0 = moment_weight · E[k kᵀ]

    `alpha` in (0, 1) weighs the edits against what the encoder knows. `preserve` are prompts whose last token is to
    keep its value: their keys join C0 with `preserve_weight` each (an edit's key weighs one). `contexts` "many" writes
    each value in many prompts besides the edit's templates: see `editing.stage_two.contexts`. Layers default to
    those of `editing.families.layout.default_layers` up to L, the layer that the values were optimised for, and must
    end at L.

    The encoder's weights are never touched. The result is a function of the *set* of edits: they are put in an order
    of their own, so that the same set gives the same bits in any order on the same platform, and a set with one edit
    taken away gives the bits of a set that never had it. `progress(done, layers)` is called after each layer.

    `values` are what `optimize_values` gave; an error among them is raised. Of a pipeline with several encoders each
    has an update of its own, from the same values and second moments: what is this encoder's in them is used.
    Pass `FactoredMoments` to keep the factorisation, which serves every α and moment_weight, between calls.
    """
    found = [_expect(value, encoder, index) for index, value in enumerate(values)]
    factored = _factored(second_moments, encoder)
    if layers is None:
        last = found[0].layer if found else encoder.value_layer
        layers = choose_default_layers(encoder.family, encoder.name, last=last)
    layers = tuple(sorted(set(layers)))
    _check_arguments(
        encoder,
        edits,
        found,
        alpha=alpha,
        moment_weight=moment_weight,
        layers=layers,
        residual_schedule=residual_schedule,
    )
    if not preserve_weight > 0:
        raise InvalidEdit("preserve_weight must be above 0", pointer="/preserve_weight")
    order = sorted(range(len(edits)), key=lambda i: _identity(edits[i], found[i]))
    conflicts = find_declared_conflicts(
        [edit.source for edit in edits], [list_destination_names(edit.destination) for edit in edits]
    )
    if not edits:
        return Update(encoder.name, {}, (), conflicts)

    delta = torch.stack([found[i].delta for i in order], 1).to(encoder.device, torch.float64)  # (d, n)
    hidden = torch.stack([found[i].hidden for i in order], 1).to(encoder.device, torch.float64)
    z = hidden + delta
    tree, owner, share = _prefixes(encoder, [edits[i] for i in order], sorted(set(preserve)), contexts)
    z = z[:, owner]  # (d, n)
    n, q = len(owner), len(layers)
    if contexts == "many":
        preserve_weight *= KEPT
    weights = torch.full(
        (tree.columns,), (1 - alpha) * preserve_weight, dtype=torch.float64, device=encoder.device
    )  # (c,)
    weights[:n] = alpha * share

    updates: dict[int, LayerUpdate] = {}
    cosines = torch.ones(len(order), len(order), device=encoder.device)
    states = tree.embed(encoder).double()
    for number in range(layers[-1] + 1):
        layer = _in(torch.float64, encoder.layers[number])
        stream = tree.attend(layer, states)
        read = tree.keys(layer, stream) if number < layers[-1] else None  # of the last layer, only at the last tokens
        if number in layers:
            done = len(updates)
            keys = tree.last_keys(layer, stream, read)  # (m, c)
            if residual_schedule == "spread":
                r = (z - _look_ahead(tree, layer, stream, encoder.layers[number + 1 : layers[-1] + 1])[:, :n]) / (
                    q - done
                )
            elif residual_schedule == "even":
                r = delta[:, owner] / q
            else:
                r = (z - recall(layer, keys[:, :n])) / (q - done)  # what the released code does
            b, a, condition = _solve(factored, number, keys, weights, r, alpha=alpha, moment_weight=moment_weight)
            dense = b @ a.T  # (d, m)
            weight = layer.mlp.fc2.weight
            updates[number] = LayerUpdate(
                number,
                b=b.cpu(),
                a=a.cpu(),
                condition=condition,
                moment_condition=factored.condition(number) if tree.columns < encoder.mlp_width else None,
                relative_norm=float(dense.norm() / weight.norm()),
            )
            weight += dense  # of the float64 copy
            _keep_smallest(cosines, _of_edits(keys[:, :n], owner))
            if progress:
                progress(done + 1, q)
        if number < layers[-1]:
            states = tree.advance(layer, stream, read)

    missed = (z - tree.states_after(layer, stream)[:, :n]).norm(dim=0)  # (n,)
    left = _of_edits(missed[None], owner)[0] / delta.norm(dim=0).clamp_min(1e-12)  # (e,)
    residuals = [0.0] * len(order)
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
def apply_temporarily(encoder: EditableEncoder, update: Update) -> Iterator[EditableEncoder]:
    """The encoder with the update in place; on leaving, its weights are what they were, bit for bit."""
    before = {layer: encoder.fc2(layer).weight.detach().clone() for layer in update.layers}
    try:
        apply_update(encoder, update)
        yield encoder
    finally:
        with torch.no_grad():
            for layer, weight in before.items():
                encoder.fc2(layer).weight.copy_(weight)


@contextmanager
def apply_all_temporarily(encoders: Iterable[EditableEncoder], updates: Iterable[Update]) -> Iterator[None]:
    """`applied` for every encoder of a pipeline; with no updates at all nothing is changed."""
    by_name = {update.encoder: update for update in updates}
    with ExitStack() as stack:
        for encoder in encoders if by_name else ():
            stack.enter_context(apply_temporarily(encoder, by_name[encoder.name]))
        yield


def _factored(second_moments: SecondMoments | FactoredMoments, encoder: EditableEncoder) -> FactoredMoments:
    if isinstance(second_moments, SecondMoments):
        return FactoredMoments(second_moments, encoder=encoder.name)
    if second_moments.encoder != encoder.name:
        raise InvalidEdit(f"the factors are of {second_moments.encoder}, not of {encoder.name}: pass those of its own")
    return second_moments


def _prefixes(
    encoder: EditableEncoder, edits: Sequence[ConceptEdit], preserve: Sequence[str], contexts: Contexts
) -> tuple[PrefixTree, Tensor, Tensor]:
    """The prompts up to their last subject token: the columns of the edits, then one for each preserved prompt. And of
    the former whose each is and how much it weighs, (n,) both."""
    locate = encoder.tokenizer.locate
    groups, owner, share = [], [], []
    for index, edit in enumerate(edits):
        own = [locate(template, edit.source).prefix for template in edit.templates]
        columns = [own]
        if contexts == "many":
            columns = [
                [prefix] for prefix in dict.fromkeys([*own, *around(encoder.tokenizer, AT_SUBJECT, edit.source)])
            ]
        groups += columns
        owner += [index] * len(columns)
        share += [1.0 if contexts == "own" else WEIGHT / len(columns)] * len(columns)
    groups += [[locate("{}", prompt, pointer="/preserve").prefix] for prompt in preserve]
    if contexts == "many":
        groups += [[prefix] for prefix in surroundings(encoder.tokenizer, [edit.source for edit in edits], preserve)]
    tree = PrefixTree(groups, device=encoder.device)
    return (
        tree,
        torch.tensor(owner, device=encoder.device),
        torch.tensor(share, dtype=torch.float64, device=encoder.device),
    )


def _of_edits(columns: Tensor, owner: Tensor) -> Tensor:
    """The mean of each edit's columns, (k, n) to (k, e)."""
    count = torch.bincount(owner)
    if len(count) == len(owner):
        return columns
    return columns.new_zeros(len(columns), len(count)).index_add_(1, owner, columns) / count


def _in(dtype: torch.dtype, layer: Any) -> Any:
    """A copy of an encoder's layer to compute in."""
    return copy.deepcopy(layer).to(dtype)


def _look_ahead(tree: PrefixTree, layer: Any, stream: Tensor, later: Iterable[Any]) -> Tensor:
    """The states after the last of the `later` layers, which are still as they were, (d, c) float64.

    In float32: an error here changes what is asked for, in proportion; it does not go through the inverse.
    """
    for following in later:
        states = tree.advance(layer, stream).float()
        layer = following if following.mlp.fc2.weight.dtype == torch.float32 else _in(torch.float32, following)
        stream = tree.attend(layer, states)
    return tree.states_after(layer, stream)


def _solve(
    factored: FactoredMoments,
    layer: int,
    keys: Tensor,
    weights: Tensor,
    r: Tensor,
    *,
    alpha: float,
    moment_weight: float,
) -> tuple[Tensor, Tensor, float]:
    """The factors B (d, r) and A (m, r) of ΔW = R [K diag(w)]ᵀ [A0 + K diag(w) Kᵀ]⁻¹, with A0 = (1-α) λ E[k kᵀ] and no
    residual asked of preserved columns; and the condition number of what was solved.

    With fewer columns than the keys are wide, by Woodbury: A0 = L Lᵀ and Y = L⁻¹ K give
    ΔW = R (diag(1/w) + Yᵀ Y)⁻¹ Yᵀ L⁻¹.
    """
    m, c = keys.shape
    d, n = r.shape
    few = n <= d
    b = r if few else torch.eye(d, dtype=r.dtype, device=r.device)
    asked = torch.zeros(c, min(n, d), dtype=r.dtype, device=r.device)  # of each column: itself, or its residual
    asked[:n] = torch.eye(n, dtype=r.dtype, device=r.device) if few else r.T
    scale = (1 - alpha) * moment_weight
    if c < m:
        factor = factored.factor(layer).to(keys.device)
        y = solve_triangular(factor, keys, upper=False)  # (m, c), times √scale
        system = torch.diag(1 / weights) + y.T @ y / scale  # (c, c)
    else:
        system = scale * factored.moment(layer).to(keys.device) + (keys * weights) @ keys.T  # (m, m)
    system_factor = factorize(system)
    if system_factor is None:
        raise SingularSecondMoment(
            f"the system of layer {layer} has no solution: estimate second moments over more captions"
        )
    if c < m:
        picked = y @ torch.cholesky_solve(asked, system_factor) / scale
        a = solve_triangular(factor.T, picked, upper=True)
    else:
        a = torch.cholesky_solve((keys * weights) @ asked, system_factor)
    return b, a, estimate_condition_number(system, system_factor)


def _keep_smallest(cosines: Tensor, keys: Tensor) -> None:
    """Lower cosines (n, n) in place to those of keys (m, n) where these are smaller."""
    unit = torch.nn.functional.normalize(keys, dim=0).float()
    for rows, columns in zip(cosines.split(_COSINES), unit.split(_COSINES, 1), strict=True):
        torch.minimum(rows, columns.T @ unit, out=rows)


def _expect(outcome: EditValue | EditingError, encoder: EditableEncoder, index: int) -> EncoderValue:
    if isinstance(outcome, EditingError):
        raise outcome
    value = outcome.encoders.get(encoder.name)
    if value is None or value.delta.shape != (encoder.width,):
        raise InvalidEdit("the value was made for another text encoder", pointer=f"/edits/{index}")
    return value


def _identity(edit: ConceptEdit, value: EncoderValue) -> tuple[str, tuple[str, ...], bytes]:
    return edit.source, edit.templates, torch.cat([value.delta, value.hidden]).numpy().tobytes()


def _ordered(first: int, second: int) -> tuple[int, int]:
    return min(first, second), max(first, second)


def _check_arguments(
    encoder: EditableEncoder,
    edits: Sequence[ConceptEdit],
    values: Sequence[EncoderValue],
    *,
    alpha: float,
    moment_weight: float,
    layers: tuple[int, ...],
    residual_schedule: str,
) -> None:
    if not 0 < alpha < 1:
        raise InvalidEdit(f"alpha must lie between 0 and 1, both excluded, not {alpha}", pointer="/alpha")
    if not (moment_weight > 0 and math.isfinite(moment_weight)):
        raise InvalidEdit(
            f"moment_weight must be a finite number above 0, not {moment_weight}", pointer="/moment_weight"
        )
    if residual_schedule not in ("spread", "even", "published"):
        detail = f'residual_schedule must be "spread", "even" or "published", not {residual_schedule!r}'
        raise InvalidEdit(detail, pointer="/residual_schedule")
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
