"""The shares of a balance as shares in pictures: mix the values of its prompts by what the model's classifier sees."""

from typing import TYPE_CHECKING
from uuid import UUID

from app.db.models import JsonObject
from app.jobs.leases import Lease
from app.models.queries import newest_statistics
from app.worker.runner import JobContext
from editing.edits import Balance, ConceptEdit

if TYPE_CHECKING:
    from editing.debias.balancing import DebiasProgress
    from editing.values import EditValue


def balance(
    context: JobContext, lease: Lease, edit: ConceptEdit, value: "EditValue", *, model_id: UUID
) -> tuple["EditValue", JsonObject]:
    """Return the edit's value mixed by Algorithm 1, and a description of how it was found.

    Where no classifier tells the prompts apart, or the model has no statistics for stage II, the value stays mixed by
    the weights asked for, and `note` says so. Raises `Cancelled`, `ClassifierUnusable`.
    """
    from editing.debias.attributes import find_attribute_classifier  # imports torch
    from editing.debias.balancing import DebiasSettings, debias

    assert isinstance(edit.destination, Balance)
    shares = edit.destination.shares
    classifier = context.pipelines.classifier(model_id)
    judge = find_attribute_classifier(classifier, list(shares)) if classifier else None
    with context.sessions() as session:
        statistics = newest_statistics(session, model_id=model_id)
    if judge is None:
        return value, _describe_not_evaluated(shares, "the model has no classifier that tells these prompts apart")
    if statistics is None or statistics.digest is None:
        return value, _describe_not_evaluated(shares, "the model has no statistics, which drawing with the edit needs")

    pipeline, digest = context.pipelines.get(model_id), statistics.digest
    settings = edit.settings

    def progress(now: "DebiasProgress") -> None:
        context.report(lease, "balancing", now.round, now.rounds)

    (found,) = debias(
        pipeline,
        [edit],
        [value],
        [context.pipelines.moments(digest, encoder=encoder.name) for encoder in pipeline.encoders],
        judge,
        settings=DebiasSettings(
            seed=settings.seed, num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale
        ),
        progress=progress,
        cancelled=lambda: context.should_stop(lease),
    )
    return found.value, {**found.to_json(), "statistics": digest, "note": None}


def _describe_not_evaluated(shares: dict[str, float], reason: str) -> JsonObject:
    note = f"{reason}: the weights are those of the values, not shares in pictures"
    return {"factors": shares, "shares": None, "converged": None, "rounds": [], "statistics": None, "note": note}
