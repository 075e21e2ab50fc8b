"""Algorithm 1: how to mix the values of several prompts so that pictures of the source show them in given shares.

    F ← max(F - η (R - R_des), 0), renormalised;   η = η0 (1 - i/m);   v = Σ F_a v_a

R are the shares found in pictures that the edited model draws of the source. The values v_a are stage I's and stay as
they are: a round costs a stage II, the pictures and their judgement. Many edits are mixed at once, each by an F of its
own, with one stage II a round for all of them.
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
    """How Algorithm 1 searches, and how the pictures of a round are drawn."""

    rounds: int = 10
    """m"""
    step: float = 0.4
    """η0"""
    tolerance: float = 0.02
    """d: the largest difference between a share in pictures and the share asked for that ends the search."""
    pictures: int = 50
    """Of each edit in a round. The standard error of a share is √(R (1-R) / `pictures`): 0.07 at a half of 50."""
    seed: int = 0
    """Of the first picture; those after it follow. Every round draws the same seeds."""
    templates: tuple[str, ...] = ()
    """What is drawn of a source, in turn; none: the edit's own templates."""
    num_inference_steps: int = 20
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        for name in ("rounds", "pictures", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise InvalidEdit(f"{name} must be at least 1, not {getattr(self, name)}", pointer=f"/{name}")
        if not self.step > 0 or not self.tolerance >= 0:
            name = "tolerance" if self.step > 0 else "step"
            raise InvalidEdit(f"{name} must be positive, not {getattr(self, name)}", pointer=f"/{name}")
        for index, template in enumerate(self.templates):
            split_template(template, pointer=f"/templates/{index}")


@dataclass(frozen=True)
class Round:
    """What one mixture gave."""

    factors: Mapping[str, float]
    """F, by prompt: the weights of the values."""
    shares: Mapping[str, float]
    """R, by prompt: the shares of the pictures."""
    difference: float
    """max |R - R_des|"""


@dataclass(frozen=True, eq=False)
class DebiasResult:
    """The mixture found for one edit."""

    value: EditValue
    """Of the chosen round; what stage II takes."""
    rounds: tuple[Round, ...]
    chosen: int
    """Into the rounds: the last where every edit met its shares, else that with the least differences on average."""
    converged: bool
    """Whether the chosen round meets the shares of this edit."""

    @property
    def factors(self) -> Mapping[str, float]:
        return self.rounds[self.chosen].factors

    @property
    def shares(self) -> Mapping[str, float]:
        """As found at the seeds of the search: those of other pictures scatter around them."""
        return self.rounds[self.chosen].shares

    def as_json(self) -> dict[str, Any]:
        """Return how the mixture was found, without its value."""
        return {
            "factors": dict(self.factors),
            "shares": dict(self.shares),
            "converged": self.converged,
            "rounds": [asdict(each) for each in self.rounds],
        }


@dataclass(frozen=True)
class DebiasProgress:
    """Said after the pictures of each edit in each round."""

    edit_index: int
    number: int
    """Rounds done, 1 … rounds."""
    rounds: int
    found: Round


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
    """Find the mixture of each edit, all applied together; each has a `Balance` as destination, whose shares are R_des.

    `values` are what `optimize_values` gave for the edits, `second_moments` those of each encoder in order, the
    arguments after them `compute_update`'s; `layers` by the encoder's name. The pipeline is left as it was.

    A mixture that meets its shares is kept while others are sought. Where not all do after the last round, the best
    round that was drawn counts, not the mixture that its differences would lead to next. The same call on the same
    platform gives the same mixtures. Raises `InvalidEdit`, and `Cancelled` when `cancelled()` says so, which is asked
    before the pictures of each edit.
    """
    wanted = [
        _wanted(edit, value, classifier, index) for index, (edit, value) in enumerate(zip(edits, values, strict=True))
    ]
    factors = [dict.fromkeys(shares, 1 / len(shares)) for shares in wanted]
    history: list[list[Round]] = [[] for _ in edits]
    mixtures: list[list[EditValue]] = []
    for number in range(settings.rounds if edits else 0):
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
        with apply_all_temporarily(pipeline.encoders, updates):
            for index, edit in enumerate(edits):
                if cancelled and cancelled():
                    raise Cancelled(f"cancelled after {number} rounds of balancing")
                shares = measure_shares(pipeline, edit, classifier, settings=settings)
                difference = max(abs(shares[prompt] - share) for prompt, share in wanted[index].items())
                history[index].append(Round(factors[index], shares, difference))
                if progress:
                    progress(DebiasProgress(index, number + 1, settings.rounds, history[index][-1]))
        missed = [index for index, rounds in enumerate(history) if not _meets(rounds[-1], settings)]
        if not missed:
            break
        rate = settings.step * (1 - number / settings.rounds)
        for index in missed:
            factors[index] = _moved(factors[index], history[index][-1].shares, wanted[index], rate)

    best = min(range(len(mixtures)), key=lambda number: _rank(history, number, settings), default=0)
    return [
        DebiasResult(mixtures[best][index], tuple(rounds), best, _meets(rounds[best], settings))
        for index, rounds in enumerate(history)
    ]


def _rank(history: Sequence[Sequence[Round]], number: int, settings: DebiasSettings) -> tuple[bool, float]:
    """The less the better: a round in which every edit meets its shares, else by the mean of their differences."""
    found = [rounds[number] for rounds in history]
    return not all(_meets(each, settings) for each in found), fmean(each.difference for each in found)


def measure_shares(
    pipeline: EditablePipeline, edit: ConceptEdit, classifier: AttributeClassifier, *, settings: DebiasSettings
) -> dict[str, float]:
    """R of the pipeline as it stands: the share of an edit's pictures that shows each prompt of its `Balance`."""
    assert isinstance(edit.destination, Balance)
    templates = settings.templates or edit.templates
    prompts = [fill_template(templates[number % len(templates)], edit.source) for number in range(settings.pictures)]
    seeds = range(settings.seed, settings.seed + settings.pictures)
    pictures = draw_pictures(
        pipeline,
        prompts,
        seeds=seeds,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    attributes = list(edit.destination.weights)
    shown = classifier.attributes(pictures, attributes).argmax(1).bincount(minlength=len(attributes))  # (prompts,)
    return {prompt: count / len(pictures) for prompt, count in zip(attributes, shown.tolist(), strict=True)}


def _moved(
    factors: Mapping[str, float], shares: Mapping[str, float], wanted: Mapping[str, float], rate: float
) -> dict[str, float]:
    """F after a step. The sum stays above 0: where all of F is cut to 0, every share would have to be too large."""
    moved = {prompt: max(own - rate * (shares[prompt] - wanted[prompt]), 0.0) for prompt, own in factors.items()}
    total = sum(moved.values())
    return {prompt: own / total for prompt, own in moved.items()}


def _meets(found: Round, settings: DebiasSettings) -> bool:
    return found.difference <= settings.tolerance + 1e-9


def _wanted(edit: ConceptEdit, value: EditValue, classifier: AttributeClassifier, index: int) -> dict[str, float]:
    """R_des, by prompt."""
    if not isinstance(edit.destination, Balance):
        raise InvalidEdit("only a balance can be debiased", pointer=f"/edits/{index}/destination")
    shares = edit.destination.shares
    if not isinstance(value, EditValue) or len(value.attributes) != len(shares):
        raise InvalidEdit("the value of each prompt is needed: optimise it anew", pointer=f"/edits/{index}")
    if not classifier.can_distinguish(list(shares)):
        raise InvalidEdit(
            "the classifier cannot tell these prompts apart", pointer=f"/edits/{index}/destination/balance"
        )
    return shares
