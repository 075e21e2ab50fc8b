"""Draw and measure a published version: the very weights that are served, in the place of the base model's."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy.orm import Session

import editing
from app.checkpoints import queries
from app.checkpoints.files import EDITABLE, list_files, store_content
from app.db.models import Evaluation, JsonObject
from app.evaluations.report import write_report
from app.jobs.leases import Lease
from app.jobs.states import end_resource
from app.storage.references import pin_blobs
from app.storage.store import Store
from app.worker.edits import concept_edit
from app.worker.runner import JobContext
from app.worker.tasks import build_checkpoint
from editing.edits import ConceptEdit, fill_template
from editing.errors import ClassifierUnusable
from editing.files import File

if TYPE_CHECKING:
    from editing.pipelines import EditablePipeline

SHOWN_EDITS = 20
HELD_OUT = 30
CHECKED = 40  # edits that a quick check draws at most
GRID_SEEDS = (0, 1, 2)
SETTINGS = ("num_inference_steps", "guidance_scale", "seed", "prompts", "held_out_prompts")
"""The fields of the request that a reader needs to get the same numbers."""


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Do what each evaluation asks for, and keep its report and files."""
    for lease in leases:
        with context.sessions() as session:
            work = _read(session, context.store, lease.target_id)
        context.report(lease, "loading")
        pipeline = context.pipelines.get(work.model_id)
        if work.kind == "preview":
            report, files = _preview(context, lease, work, pipeline)
        else:
            report, files = _evaluation(context, lease, work, pipeline)
        with context.result(lease) as session:
            pin_blobs(session, context.store, [file.sha256 for file in files])
            evaluation = session.get_one(Evaluation, lease.target_id, with_for_update=True)
            evaluation.report = report
            evaluation.files = [asdict(file) for file in files]
            details = {"files": {file.path: file.sha256 for file in files}}
            end_resource(session, lease=lease, state=lease.kind.done, details=details)


@dataclass(frozen=True)
class _Work:
    """What the job needs, out of the database."""

    kind: str
    model_id: UUID
    title: str
    request: Mapping[str, Any]
    edits: Sequence[ConceptEdit]
    ids: Sequence[str]
    """Of the edits."""
    residuals: Mapping[str, float]
    """What the update left of each edit, by its id."""
    files: Sequence[File]
    facts: Mapping[str, Any]
    """Of the version, for the report."""
    built: build_checkpoint.BuildInputs | None
    """What the version was built from, where some of its edits are to be built alone."""


def _read(session: Session, store: Store, evaluation_id: UUID) -> _Work:
    evaluation = session.get_one(Evaluation, evaluation_id)
    checkpoint = evaluation.checkpoint
    model = checkpoint.model
    edits = queries.list_edits(session, checkpoint_id=checkpoint.id)
    return _Work(
        kind=evaluation.kind,
        model_id=model.id,
        title=f"{model.name}: v{checkpoint.number} beside the base model",
        request=evaluation.request,
        edits=[concept_edit(edit, store=store) for edit in edits],
        ids=[str(edit.id) for edit in edits],
        residuals=(checkpoint.report or {}).get("relative_residuals", {}),
        files=list_files(checkpoint),
        facts={
            "model": model.digest,
            "classifier": model.classifier,
            "commit": checkpoint.commit,
            "alpha": checkpoint.alpha,
            **checkpoint.options,
        },
        built=build_checkpoint.read(session, store=store, checkpoint_id=checkpoint.id)
        if evaluation.request.get("scales")
        else None,
    )


def _preview(
    context: JobContext, lease: Lease, work: _Work, pipeline: "EditablePipeline"
) -> tuple[JsonObject, list[File]]:
    """Draw every prompt at every seed, before and after, as one picture."""
    request = work.request
    prompts = request["prompts"] or _first_prompts(work)
    grid = _draw(context, lease, work, pipeline, prompts, controls=request["controls"], seeds=request["seeds"])
    return {"prompts": prompts, "controls": request["controls"], "seeds": request["seeds"]}, [grid]


def _first_prompts(work: _Work) -> list[str]:
    return [fill_template(edit.templates[0], edit.source) for edit in work.edits[:SHOWN_EDITS]]


def _draw(
    context: JobContext,
    lease: Lease,
    work: _Work,
    pipeline: "EditablePipeline",
    prompts: Sequence[str],
    *,
    controls: Sequence[str],
    seeds: Sequence[int],
) -> File:
    """Store the pictures of prompts and controls, before and after, as one file."""
    grid = io.BytesIO()
    editing.draw_comparison(
        pipeline,
        _publish_temporarily(context.store, work.files, pipeline),
        title=work.title,
        prompts=prompts,
        controls=controls,
        seeds=seeds,
        num_inference_steps=work.request["num_inference_steps"],
        guidance_scale=work.request["guidance_scale"],
        progress=partial(context.advance, lease, "drawing"),
    ).save(grid, format="PNG")
    return store_content(context.store, "before-after.png", grid.getvalue())


def _evaluation(
    context: JobContext, lease: Lease, work: _Work, pipeline: "EditablePipeline"
) -> tuple[JsonObject, list[File]]:
    """Every edit that the classifier can judge, and held-out concepts; with pictures, unless it is a mere check."""
    from editing.evaluation.edit_sets import (
        choose_held_out,
        describe_edits,
        describe_environment,
        evaluate_edits,
        plan_evaluation,
    )
    from editing.evaluation.plot import plot_scales

    classifier = context.pipelines.classifier(work.model_id)
    if classifier is None:
        raise ClassifierUnusable("the model has no classifier any more")
    request = work.request
    held_out = request["held_out"]
    plan = plan_evaluation(
        work.edits,
        classifier,
        prompts=request["prompts"],
        held_out=choose_held_out(classifier, work.edits, count=HELD_OUT) if held_out is None else held_out,
        held_out_prompts=request["held_out_prompts"],
        seed=request["seed"],
        templates=work.kind != "check",
        only=_suspects(work) if work.kind == "check" else None,
    )
    replaced = [work.ids[index] for index in plan.indices[0]]
    counts = sorted({count for count in request["scales"] if count < len(replaced)})
    evaluation = evaluate_edits(
        pipeline,
        classifier,
        plan,
        partial(_publish_temporarily, context.store, work.files, pipeline),
        num_inference_steps=request["num_inference_steps"],
        guidance_scale=request["guidance_scale"],
        scales={count: partial(_apply_subset, context, lease, work, pipeline, replaced[:count]) for count in counts},
        progress=partial(context.advance, lease, "judging"),
    )
    report: JsonObject = {
        **evaluation.to_json(),
        **describe_edits(plan, evaluation, work.edits, ids=work.ids, residuals=work.residuals),
        "settings": {
            **describe_environment(pipeline),
            **{name: request[name] for name in SETTINGS},
            **work.facts,
            "files": {file.path: file.sha256 for file in work.files},
        },
    }
    if work.kind == "check":
        return report, []
    controls = [fill_template(request["held_out_prompts"][0], name) for name in report["held_out"][: SHOWN_EDITS // 2]]
    grid = _draw(context, lease, work, pipeline, _first_prompts(work), controls=controls, seeds=GRID_SEEDS)
    plots = []
    if counts:
        scales = {**evaluation.scales, len(replaced): evaluation.scores}
        plots.append(store_content(context.store, "scales.png", plot_scales(scales, title=work.title)))
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    return report, [
        grid,
        *plots,
        store_content(context.store, "report.json", content.encode()),
        store_content(context.store, "report.md", write_report(report, title=work.title)),
    ]


def _suspects(work: _Work) -> set[int]:
    """Return the numbers of the edits that a quick check draws: those with the largest residuals."""
    order = sorted(range(len(work.ids)), key=lambda index: -work.residuals.get(work.ids[index], 0.0))
    return set(order[:CHECKED])


@contextmanager
def _apply_subset(
    context: JobContext, lease: Lease, work: _Work, pipeline: "EditablePipeline", ids: Sequence[str]
) -> Iterator[None]:
    """Apply these edits of the version alone, computed as for the version."""
    built = work.built
    assert built is not None
    kept = [place for place, edit in enumerate(built.inputs.edits_by("text_encoder")) if str(edit.id) in ids]
    few = replace(
        built, edits=tuple(built.edits[place] for place in kept), values=tuple(built.values[place] for place in kept)
    )
    updates = [update for _, update in build_checkpoint.solve(context, lease, few)]
    with editing.apply_all_temporarily(pipeline.encoders, updates):
        yield


def _publish_temporarily(
    store: Store, files: Sequence[File], pipeline: "EditablePipeline"
) -> AbstractContextManager[None]:
    """Put the version's own weights into the pipeline, each file checked against its sha256."""
    weights = (
        (file.path.partition("/")[0], store.fetch(file.sha256))
        for file in files
        if file.path.startswith(EDITABLE) and file.path.endswith(".safetensors")
    )
    return editing.load_components_temporarily(pipeline, weights)
