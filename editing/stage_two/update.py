"""Stage II: write the values of all edits into the output matrices of many layers at once, in closed form.

Keys and solves are float64. The published code scales C0 in float32 before it solves, which changes ΔW by up to 5e-4.
A solution that is exact to rounding also gives the same float16 weights for any order of summation.

Shapes: e edits; n columns of the edits (one each, or one for each context); c all columns (theirs, then the preserved
ones); q edited layers; N nodes of the prompts; d width; m width of the keys.

Memory besides the encoder and the cached factors: three (N, d) and three (m, c) in float64; the keys (N, m) of few
nodes; one layer in float64; (e, e) cosines in float32; three (m, m) if c ≥ m; the result, at most (d + m)·d a layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from editing.edits import ConceptEdit
from editing.encoders.base import Block, TextEncoder
from editing.encoders.nodes import Nodes, Site
from editing.encoders.prefix_trees import build_nodes
from editing.errors import EditingError, InvalidEdit, SingularSecondMoment
from editing.families.layout import choose_default_layers
from editing.prompts import SubjectPosition
from editing.restore import restore_weights
from editing.second_moments.factors import FactoredMoments, estimate_condition_number, factorize
from editing.second_moments.moments import SecondMoments
from editing.stage_two.conflicts import Conflict, find_declared_conflicts, list_destination_names
from editing.stage_two.contexts import (
    AT_SUBJECT,
    EDIT_WEIGHT,
    PRESERVE_WEIGHT,
    Contexts,
    find_preserved_positions,
    locate_in_contexts,
)
from editing.values import EditValue, EncoderValue

ResidualSchedule = Literal["spread", "even", "published"]
"""R of each edited layer i = 0 … q-1: "spread" (z - h_L now)/(q - i), "even" δ/q, "published" (z - W k)/(q - i)."""

_SAME_KEY = 0.98  # cosine of two keys from which a conflict is reported
_COSINE_ROWS = 512  # rows of cosines computed at a time: (512, e)


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW = B Aᵀ of one layer's memory, of rank r = min(n, d)."""

    layer: int
    b: Tensor
    """B (d, r) float64: R, or the identity if n > d"""
    a: Tensor
    """A (m, r) float64: what picks each column's residual out of a key, or ΔWᵀ if n > d"""
    condition: float
    """Condition number of the solved system: (c, c) by Woodbury, (m, m) if c ≥ m."""
    moment_condition: float | None
    """Condition number of the second moments; None if they were not inverted."""
    relative_norm: float
    """‖ΔW‖ / ‖W‖, Frobenius."""

    def to_dense(self) -> Tensor:
        """Return ΔW (d, m) float64."""
        return self.b @ self.a.T


@dataclass(frozen=True)
class Update:
    """The result of stage II for one encoder. It changes no weights: see `apply_update` and `editing.weights`."""

    encoder: str
    layers: Mapping[int, LayerUpdate]
    relative_residuals: tuple[float, ...]
    """Per edit, in the caller's order: ‖z - h_L after the update‖ / ‖δ‖. 0: fully applied. 1: no effect."""
    conflicts: tuple[Conflict, ...]
    family: str = "sd1"
    """Of the pipeline."""

    def to_dense(self, layer: int) -> Tensor:
        """Return ΔW (d, m) float64 of one layer."""
        return self.layers[layer].to_dense()

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
    encoder: TextEncoder,
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
    """Compute ΔW of every edited layer in ascending order, each on the weights as edited so far (Eq. 5 and 14).

        ΔW = α R Kᵀ [(1-α) C0 + α K Kᵀ]⁻¹,   C0 = moment_weight · E[k kᵀ]

    `alpha` in (0, 1) weighs the edits against what the encoder knows. `preserve` are prompts whose last token keeps its
    value: their keys join C0 with the weight `preserve_weight` each, where a key of an edit has weight one. `contexts`
    "many" writes each value in more prompts than the edit's templates: see `editing.stage_two.contexts`. `layers`
    default to those of `choose_default_layers` up to L, the layer that the values were optimized for; they end at L.

    The encoder's weights are not changed. The result is a function of the *set* of edits: any order gives the same bits
    on the same platform, and a set without an edit gives the bits of a set that never had it. `progress(done, layers)`
    is called after each layer.

    `values` are the outcomes of `optimize_values`; an error among them is raised. Each encoder of a pipeline has its
    own update, from the same values and second moments. Pass `FactoredMoments` to keep the factors between calls: they
    serve every `alpha` and `moment_weight`.
    """
    own_values = [_select_value(value, encoder, index) for index, value in enumerate(values)]
    factors = _factor_moments(second_moments, encoder)
    if layers is None:
        last = own_values[0].layer if own_values else encoder.value_layer
        layers = choose_default_layers(encoder.family, encoder.name, last=last)
    layers = tuple(sorted(set(layers)))
    _check_arguments(
        encoder,
        edits,
        own_values,
        alpha=alpha,
        moment_weight=moment_weight,
        layers=layers,
        residual_schedule=residual_schedule,
        preserve_weight=preserve_weight,
    )
    # Sums depend on the order of the edits by rounding: an order of their own makes them a function of the set.
    order = sorted(range(len(edits)), key=lambda i: _sort_key(edits[i], own_values[i]))
    conflicts = find_declared_conflicts(
        [edit.source for edit in edits], [list_destination_names(edit.destination) for edit in edits]
    )
    if not edits:
        return Update(encoder.name, {}, (), conflicts, encoder.family)

    delta = torch.stack([own_values[i].delta for i in order], 1).to(encoder.device, torch.float64)  # (d, e)
    hidden = torch.stack([own_values[i].hidden for i in order], 1).to(encoder.device, torch.float64)  # (d, e)
    nodes, owner, share = _build_columns(encoder, [edits[i] for i in order], sorted(set(preserve)), contexts)
    z = (hidden + delta)[:, owner]  # (d, n): the state that each column should have after layer L
    n, q = len(owner), len(layers)
    # The weight of each column in the sums: α for the edits, 1-α for what is preserved, as in Eq. 1.
    if contexts == "many":
        preserve_weight *= PRESERVE_WEIGHT
    weights = torch.full(
        (nodes.columns,), (1 - alpha) * preserve_weight, dtype=torch.float64, device=encoder.device
    )  # (c,)
    weights[:n] = alpha * share

    updates: dict[int, LayerUpdate] = {}
    cosines = torch.ones(len(order), len(order), device=encoder.device)  # (e, e)
    states = nodes.embed().double()  # (N, d)
    for number in range(layers[-1] + 1):
        # Step 1: run the layer's attention, on states that the layers edited so far have produced.
        block = encoder.blocks[number].copy(torch.float64)
        stream = nodes.attend(number, block, states)  # (N, d)
        all_keys = nodes.prepare_keys(block, stream) if number < layers[-1] else None  # L needs the sites only
        if number in layers:
            # Step 2: K, the mean keys of the columns, and what the matrix W gives for them.
            done = len(updates)
            keys = nodes.average_keys(block, stream, all_keys)  # (m, c)
            outputs = block.output_matrix(keys[:, :n].T)  # (n, d)
            # Step 3: R, the part of the residual that this layer takes on. Between the matrix and the residual stream
            # there may be a norm.
            if residual_schedule == "published":
                residual = (z - outputs.T) / (q - done)  # (d, n)
            elif residual_schedule == "even":
                residual = block.pull_back(outputs, delta[:, owner].T / q).T
            else:
                now = _look_ahead(nodes, block, stream, number=number, last=layers[-1])  # (d, c)
                residual = block.pull_back(outputs, (z - now[:, :n]).T / (q - done)).T
            # Step 4: ΔW = B Aᵀ, Eq. 5.
            b, a, condition = _solve(factors, number, keys, weights, residual, scale=(1 - alpha) * moment_weight)
            dense = b @ a.T  # (d, m)
            weight = block.output_matrix.weight
            updates[number] = LayerUpdate(
                number,
                b=b.cpu(),
                a=a.cpu(),
                condition=condition,
                moment_condition=factors.load_condition(number) if nodes.columns < encoder.mlp_width else None,
                relative_norm=float(dense.norm() / weight.norm()),
            )
            # Step 5: edit the float64 copy, so that the next layers see the change.
            weight += dense
            _keep_smallest(cosines, _average_columns(keys[:, :n], owner))
            if progress:
                progress(done + 1, q)
        if number < layers[-1]:
            states = nodes.run_mlp(block, stream, all_keys, out=stream)
            del block, stream, all_keys  # before the next ones: two layers of a large encoder take gigabytes

    missing = (z - nodes.average_states(block, stream)[:, :n]).norm(dim=0)  # (n,)
    relative = _average_columns(missing[None], owner)[0] / delta.norm(dim=0).clamp_min(1e-12)  # (e,)
    relative_residuals = [0.0] * len(order)
    for position, index in enumerate(order):
        relative_residuals[index] = float(relative[position])
    pairs = (cosines.triu(1) >= _SAME_KEY).nonzero().tolist()
    conflicts += tuple(
        Conflict("same key", _order_pair(order[i], order[j]), cosine=float(cosines[i, j]))
        for i, j in pairs
        if edits[order[i]].source != edits[order[j]].source
    )
    return Update(encoder.name, updates, tuple(relative_residuals), conflicts, encoder.family)


@torch.no_grad()
def apply_update(encoder: TextEncoder, update: Update) -> None:
    """Add ΔW to the encoder's weights in memory, rounding once to their dtype."""
    for layer, change in update.layers.items():
        weight = encoder.output_matrix(layer).weight
        weight.copy_(weight.double() + change.to_dense().to(weight.device))


@contextmanager
def apply_temporarily(encoder: TextEncoder, update: Update) -> Iterator[TextEncoder]:
    """Apply the update and restore the encoder's weights on exit, bit for bit."""
    with restore_weights(encoder.output_matrix(layer).weight for layer in update.layers):
        apply_update(encoder, update)
        yield encoder


@contextmanager
def apply_all_temporarily(encoders: Iterable[TextEncoder], updates: Iterable[Update]) -> Iterator[None]:
    """Apply the updates of a pipeline's encoders and restore their weights on exit. No updates change nothing."""
    by_name = {update.encoder: update for update in updates}
    with ExitStack() as stack:
        for encoder in encoders if by_name else ():
            stack.enter_context(apply_temporarily(encoder, by_name[encoder.name]))
        yield


def _factor_moments(second_moments: SecondMoments | FactoredMoments, encoder: TextEncoder) -> FactoredMoments:
    if isinstance(second_moments, SecondMoments):
        return FactoredMoments(second_moments, encoder=encoder.name)
    if second_moments.encoder != encoder.name:
        raise InvalidEdit(f"the factors belong to {second_moments.encoder}: pass those of {encoder.name}")
    return second_moments


def _build_columns(
    encoder: TextEncoder, edits: Sequence[ConceptEdit], preserve: Sequence[str], contexts: Contexts
) -> tuple[Nodes, Tensor, Tensor]:
    """Build the nodes of the prompts with the last subject tokens: the edits' columns, then the preserved ones.

    Returns also, for the edits' columns, the edit that each belongs to and its share of the edit's weight, (n,) both.
    """
    tokenizer = encoder.tokenizer

    def find_site(position: SubjectPosition) -> Site:
        # What follows the subject matters only where attention is bidirectional.
        ids = position.prefix if encoder.is_causal else position.ids
        return ids, position.last_subject_index

    groups: list[list[Site]] = []
    owner, share = [], []
    for index, edit in enumerate(edits):
        templates = [find_site(tokenizer.locate(template, edit.source)) for template in edit.templates]
        columns = [templates]  # one column: the mean over the templates
        if contexts == "many":
            others = map(find_site, locate_in_contexts(tokenizer, AT_SUBJECT, edit.source))
            columns = [[site] for site in dict.fromkeys([*templates, *others])]
        groups += columns
        owner += [index] * len(columns)
        share += [1.0 if contexts == "own" else EDIT_WEIGHT / len(columns)] * len(columns)
    groups += [[find_site(tokenizer.locate("{}", prompt, pointer="/preserve"))] for prompt in preserve]
    if contexts == "many":
        sources = [edit.source for edit in edits]
        groups += [[find_site(position)] for position in find_preserved_positions(tokenizer, sources, preserve)]
    return (
        build_nodes(encoder, groups),
        torch.tensor(owner, device=encoder.device),
        torch.tensor(share, dtype=torch.float64, device=encoder.device),
    )


def _average_columns(columns: Tensor, owner: Tensor) -> Tensor:
    """Average the columns of each edit, (·, n) to (·, e)."""
    count = torch.bincount(owner)  # (e,)
    if len(count) == len(owner):
        return columns
    return columns.new_zeros(len(columns), len(count)).index_add_(1, owner, columns) / count


def _look_ahead(nodes: Nodes, block: Block, stream: Tensor, *, number: int, last: int) -> Tensor:
    """Return the states after layer `last`, of which those after `number` are not edited yet, (d, c) float64.

    They run in float32: an error here changes the residual in proportion and is not amplified by the inverse.
    """
    for following in range(number + 1, last + 1):
        out = torch.empty_like(stream, dtype=torch.float32) if following == number + 1 else stream
        states = nodes.run_mlp(block, stream, out=out)
        block = nodes.encoder.blocks[following]
        if {parameter.dtype for parameter in block.layer.parameters()} != {torch.float32}:
            block = block.copy(torch.float32)
        stream = nodes.attend(following, block, states)
    return nodes.average_states(block, stream)


def _solve(
    factors: FactoredMoments, layer: int, keys: Tensor, weights: Tensor, residual: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, float]:
    """Solve Eq. 5 for ΔW = B Aᵀ. Return B (d, r), A (m, r) and the condition number of the solved system.

        ΔW = R [K D]ᵀ [A0 + K D Kᵀ]⁻¹,   A0 = (1-α) λ E[k kᵀ] = scale · E[k kᵀ],   D = diag(weights)

    R has zeros for the preserved columns. With fewer columns than the keys are wide, c < m, the Woodbury identity needs
    only a (c, c) system: with E[k kᵀ] = L Lᵀ and Y = L⁻¹ K,

        ΔW = R (D⁻¹ + Yᵀ Y / scale)⁻¹ Yᵀ L⁻¹ / scale
    """
    m, c = keys.shape
    d, n = residual.shape
    # B Aᵀ has the smaller of both ranks: B = R if n ≤ d, else B = I and A = ΔWᵀ.
    low_rank = n <= d
    b = residual if low_rank else torch.eye(d, dtype=residual.dtype, device=residual.device)
    right = torch.zeros(c, min(n, d), dtype=residual.dtype, device=residual.device)  # (c, r): I, or Rᵀ
    right[:n] = torch.eye(n, dtype=residual.dtype, device=residual.device) if low_rank else residual.T
    if c < m:
        factor = factors.load_factor(layer, device=keys.device)  # L (m, m)
        y = solve_triangular(factor, keys, upper=False)  # Y (m, c)
        system = torch.diag(1 / weights) + y.T @ y / scale  # (c, c)
    else:
        system = scale * factors.load_moment(layer).to(keys.device) + (keys * weights) @ keys.T  # (m, m)
    system_factor = factorize(system)
    if system_factor is None:
        raise SingularSecondMoment(f"layer {layer} has no solution: estimate second moments from more captions")
    if c < m:
        a = solve_triangular(factor.T, y @ torch.cholesky_solve(right, system_factor) / scale, upper=True)
    else:
        a = torch.cholesky_solve((keys * weights) @ right, system_factor)
    return b, a, estimate_condition_number(system_factor)


def _keep_smallest(cosines: Tensor, keys: Tensor) -> None:
    """Lower the cosines (e, e) in place to those of the keys (m, e) where these are smaller."""
    unit = torch.nn.functional.normalize(keys, dim=0).float()
    for rows, columns in zip(cosines.split(_COSINE_ROWS), unit.split(_COSINE_ROWS, 1), strict=True):
        torch.minimum(rows, columns.T @ unit, out=rows)


def _select_value(outcome: EditValue | EditingError, encoder: TextEncoder, index: int) -> EncoderValue:
    if isinstance(outcome, EditingError):
        raise outcome
    value = outcome.encoders.get(encoder.name)
    if value is None or value.delta.shape != (encoder.width,):
        raise InvalidEdit(f"the value is for another text encoder than {encoder.name}", pointer=f"/edits/{index}")
    return value


def _sort_key(edit: ConceptEdit, value: EncoderValue) -> tuple[str, tuple[str, ...], bytes]:
    return edit.source, edit.templates, torch.cat([value.delta, value.hidden]).numpy().tobytes()


def _order_pair(first: int, second: int) -> tuple[int, int]:
    return min(first, second), max(first, second)


def _check_arguments(
    encoder: TextEncoder,
    edits: Sequence[ConceptEdit],
    values: Sequence[EncoderValue],
    *,
    alpha: float,
    moment_weight: float,
    layers: tuple[int, ...],
    residual_schedule: str,
    preserve_weight: float,
) -> None:
    if not 0 < alpha < 1:
        raise InvalidEdit(f"alpha must be between 0 and 1, both excluded, not {alpha}", pointer="/alpha")
    if not (moment_weight > 0 and math.isfinite(moment_weight)):
        detail = f"moment_weight must be a finite number above 0, not {moment_weight}"
        raise InvalidEdit(detail, pointer="/moment_weight")
    if residual_schedule not in ("spread", "even", "published"):
        detail = f'residual_schedule must be "spread", "even" or "published", not {residual_schedule!r}'
        raise InvalidEdit(detail, pointer="/residual_schedule")
    if len(edits) != len(values):
        raise InvalidEdit(f"{len(edits)} edits with {len(values)} values: each needs its own", pointer="/edits")
    if not layers or layers[0] < 0 or layers[-1] >= encoder.n_layers:
        raise InvalidEdit(f"layers must be among 0 … {encoder.n_layers - 1}", pointer="/layers")
    if not preserve_weight > 0:
        raise InvalidEdit(f"preserve_weight must be above 0, not {preserve_weight}", pointer="/preserve_weight")
    for index, value in enumerate(values):
        if value.layer != layers[-1]:
            raise InvalidEdit(
                f"the value was optimized for layer {value.layer}, which must be the last edited layer, "
                f"not {layers[-1]}: change layers, or optimize the edit for layer {layers[-1]}",
                pointer="/layers",
            )
        if not (value.delta.isfinite().all() and value.hidden.isfinite().all()):
            raise InvalidEdit("the value is not finite", pointer=f"/edits/{index}")
