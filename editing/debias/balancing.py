"""Algorithm 1: weigh the values of several prompts so that pictures of the source show them in given shares.

    F ← max(F - η (R - R_des), 0), normalized to Σ F = 1;   η = η0 (1 - i/m);   v = Σ F_a v_a

F are the factors, R the shares measured in pictures of the edited model, R_des the desired shares, i the round of m.
The values v_a are stage I's and do not change: a round costs a stage II, the pictures and their classification. Several
edits are balanced at once, each with its own F, and share the stage II of each round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from editing.debias.attributes import AttributeClassifier
from editing.edits import Balance, ConceptEdit, fill_template, split_template
from editing.errors import Cancelled, InvalidEdit
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_two.update import ResidualSchedule, apply_all_temporarily, compute_update
from editing.values import EditValue, mix


@dataclass(frozen=True, kw_only=True)
class DebiasSettings:
    """Settings of Algorithm 1, and of the pictures of a round."""

    rounds: int = 10
    """m"""
    step: float = 0.4
    """η0"""
    tolerance: float = 0.02
    """d: the largest difference of a share from the desired one at which the rounds end."""
    pictures: int = 50
    """Pictures of each edit in a round. The standard error of a share is √(R (1-R) / `pictures`): 0.07 for R = 0.5."""
    seed: int = 0
    """Seed of the first picture; the others follow. Every round uses the same seeds."""
    templates: tuple[str, ...] = ()
    """Prompts of the pictures, in turn. Default: the edit's templates."""
    num_inference_steps: int | None = None
    """Of sampling, as `guidance_scale`. None: that of the pipeline's family."""
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "pictures", "num_inference_steps"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InvalidEdit(f"{name} must be at least 1, not {number}", pointer=f"/{name}")
        if not self.step > 0 or not self.tolerance >= 0:
            name = "tolerance" if self.step > 0 else "step"
            raise InvalidEdit(f"{name} must be positive, not {getattr(self, name)}", pointer=f"/{name}")
        for index, template in enumerate(self.templates):
            split_template(template, pointer=f"/templates/{index}")


@dataclass(frozen=True)
class DebiasRound:
    """The result of one mixture."""

    factors: Mapping[str, float]
    """F by prompt: the weights of the values."""
    shares: Mapping[str, float]
    """R by prompt: the shares of the pictures."""
    difference: float
    """max |R - R_des|"""


@dataclass(frozen=True, eq=False)
class DebiasResult:
    """The mixture for one edit."""

    value: EditValue
    """The mixed value of the chosen round, for stage II."""
    rounds: tuple[DebiasRound, ...]
    chosen: int
    """Index of the chosen round: the last if every edit reached its shares, else the one with the smallest mean
    difference."""
    converged: bool
    """Whether the chosen round reaches the shares of this edit."""

    @property
    def factors(self) -> Mapping[str, float]:
        return self.rounds[self.chosen].factors

    @property
    def shares(self) -> Mapping[str, float]:
        """The shares at the seeds of the rounds. Pictures with other seeds scatter around them."""
        return self.rounds[self.chosen].shares

    def to_json(self) -> dict[str, Any]:
        """Return the mixture and its rounds, without the value."""
        return {
            "factors": dict(self.factors),
            "shares": dict(self.shares),
            "converged": self.converged,
            "rounds": [asdict(each) for each in self.rounds],
        }


@dataclass(frozen=True)
class DebiasProgress:
    """Reported after the pictures of each edit in each round."""

    edit_index: int
    round: int
    """Rounds done, 1 … rounds."""
    rounds: int
    result: DebiasRound


def debias(
    pipeline: EditablePipeline,
    edits: Sequence[ConceptEdit],
    values: Sequence[EditValue],
    second_moments: Sequence[SecondMoments | FactoredMoments],
    classifier: AttributeClassifier,
    *,
    settings: DebiasSettings = DebiasSettings(),
    alpha: float = 0.5,
    moment_weight: float = 1000.0,
    layers: Mapping[str, Sequence[int]] | None = None,
    residual_schedule: ResidualSchedule = "spread",
    progress: Callable[[DebiasProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[DebiasResult]:
    """Find the mixture of each edit, with all edits applied together. Each destination is a `Balance`.

    `values` are the results of `optimize_values`, `second_moments` those of each encoder in order. The arguments after
    `settings` are those of `compute_update`, with `layers` by the encoder's name. The pipeline is not changed.

    A mixture that reaches its shares is kept while the others go on. If some do not reach theirs in the last round, the
    best round counts. The same call on the same platform gives the same mixtures. Raises `InvalidEdit`, and `Cancelled`
    if `cancelled()` returns True, which is called before the pictures of each edit.
    """
    desired = [
        _check_balance(edit, value, classifier, index)
        for index, (edit, value) in enumerate(zip(edits, values, strict=True))
    ]
    factors = [dict.fromkeys(shares, 1 / len(shares)) for shares in desired]  # F starts uniform
    history: list[list[DebiasRound]] = [[] for _ in edits]
    mixtures: list[list[EditValue]] = []
    for number in range(settings.rounds if edits else 0):
        # Step 1: v = Σ F_a v_a, and stage II with it.
        mixtures.append([mix(value.attributes, [*own.values()]) for value, own in zip(values, factors, strict=True)])
        updates = [
            compute_update(
                encoder,
                edits,
                mixtures[-1],
                moments,
                alpha=alpha,
                moment_weight=moment_weight,
                layers=None if layers is None else layers[encoder.name],
                residual_schedule=residual_schedule,
            )
            for encoder, moments in zip(pipeline.encoders, second_moments, strict=True)
        ]
        # Step 2: R, the shares in pictures of the edited model.
        with apply_all_temporarily(pipeline.encoders, updates):
            for index, edit in enumerate(edits):
                if cancelled and cancelled():
                    raise Cancelled(f"cancelled after {number} rounds of balancing")
                shares = measure_shares(pipeline, edit, classifier, settings=settings)
                difference = max(abs(shares[prompt] - share) for prompt, share in desired[index].items())
                history[index].append(DebiasRound(factors[index], shares, difference))
                if progress:
                    progress(DebiasProgress(index, number + 1, settings.rounds, history[index][-1]))
        # Step 3: F ← max(F - η (R - R_des), 0) for the edits that are still off.
        missed = [index for index, rounds in enumerate(history) if not _reaches_shares(rounds[-1], settings)]
        if not missed:
            break
        rate = settings.step * (1 - number / settings.rounds)  # η
        for index in missed:
            factors[index] = _move_factors(factors[index], history[index][-1].shares, desired[index], rate)

    best = min(range(len(mixtures)), key=lambda number: _rank_round(history, number, settings), default=0)
    return [
        DebiasResult(mixtures[best][index], tuple(rounds), best, _reaches_shares(rounds[best], settings))
        for index, rounds in enumerate(history)
    ]


def _rank_round(history: Sequence[Sequence[DebiasRound]], number: int, settings: DebiasSettings) -> tuple[bool, float]:
    """Rank a round, the smallest first: all edits reach their shares, then the mean of the differences."""
    results = [rounds[number] for rounds in history]
    all_reached = all(_reaches_shares(result, settings) for result in results)
    return not all_reached, fmean(result.difference for result in results)


def measure_shares(
    pipeline: EditablePipeline, edit: ConceptEdit, classifier: AttributeClassifier, *, settings: DebiasSettings
) -> dict[str, float]:
    """Return R of the pipeline: the share of an edit's pictures that shows each prompt of its `Balance`."""
    assert isinstance(edit.destination, Balance)
    templates = settings.templates or edit.templates
    prompts = [fill_template(templates[number % len(templates)], edit.source) for number in range(settings.pictures)]
    pictures = draw_pictures(
        pipeline,
        prompts,
        seeds=range(settings.seed, settings.seed + settings.pictures),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    attributes = list(edit.destination.weights)
    confidences = classifier.classify_attributes(pictures, attributes)  # (pictures, attributes)
    counts = confidences.argmax(1).bincount(minlength=len(attributes))  # (attributes,)
    return {prompt: count / len(pictures) for prompt, count in zip(attributes, counts.tolist(), strict=True)}


def _move_factors(
    factors: Mapping[str, float], shares: Mapping[str, float], desired: Mapping[str, float], rate: float
) -> dict[str, float]:
    """Return F after a step.

    Its sum stays above 0: all of F could only be cut to 0 if every share were too large, but shares sum to one.
    """
    moved = {prompt: max(own - rate * (shares[prompt] - desired[prompt]), 0.0) for prompt, own in factors.items()}
    total = sum(moved.values())
    return {prompt: own / total for prompt, own in moved.items()}


def _reaches_shares(result: DebiasRound, settings: DebiasSettings) -> bool:
    return result.difference <= settings.tolerance + 1e-9


def _check_balance(
    edit: ConceptEdit, value: EditValue, classifier: AttributeClassifier, index: int
) -> dict[str, float]:
    """Return R_des by prompt. Raises `InvalidEdit`."""
    if not isinstance(edit.destination, Balance):
        raise InvalidEdit("only a balance can be debiased", pointer=f"/edits/{index}/destination")
    shares = edit.destination.shares
    if not isinstance(value, EditValue) or len(value.attributes) != len(shares):
        raise InvalidEdit("the value of each prompt is missing: optimize the edit again", pointer=f"/edits/{index}")
    if not classifier.can_distinguish(list(shares)):
        raise InvalidEdit(
            "the classifier cannot tell these prompts apart", pointer=f"/edits/{index}/destination/balance"
        )
    return shares
