"""Draw and measure a published version: the very weights that are served, in the place of the base model's."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy.orm import Session

import editing
from app.audit.service import record
from app.checkpoints import queries
from app.checkpoints.publish import StoredFile, own_files, store_content
from app.db.leases import Lease
from app.db.models import Evaluation, JsonObject
from app.queueing.states import CANCELLED
from app.storage.local import LocalStore
from app.worker.runner import JobContext
from editing.concepts import fill
from editing.errors import Cancelled

if TYPE_CHECKING:
    from PIL import Image

    from editing.pipelines import EditablePipeline

SHOWN_EDITS = 20
WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Do what each evaluation asks for, and keep its report and files."""
    for lease in leases:
        with context.sessions() as session:
            work = _read(session, lease.target_id)
        context.progress(lease, {"stage": "loading"})
        pipeline = context.pipeline(work.model_id)
        report, files = _preview(context, lease, work, pipeline)
        with context.result(lease) as session:
            evaluation = session.get_one(Evaluation, lease.target_id, with_for_update=True)
            evaluation.state, evaluation.problem, evaluation.report = "ready", None, report
            evaluation.files = [{"name": file.path, "sha256": file.sha256, "size": file.size} for file in files]
            details = {"evaluation": str(evaluation.id), "files": {file.path: file.sha256 for file in files}}
            record(session, actor="worker", action="evaluation.ready", target=_target(evaluation), details=details)


def fail(session: Session, *, lease: Lease, problem: JsonObject) -> None:
    """The evaluation is `failed`, or `cancelled` where that was asked for."""
    evaluation = session.get_one(Evaluation, lease.target_id)
    evaluation.state = "cancelled" if problem == CANCELLED else "failed"
    evaluation.problem = problem
    details = {"evaluation": str(evaluation.id), "attempt": lease.attempt, "problem": problem["title"]}
    action = f"evaluation.{evaluation.state}"
    record(session, actor="worker", action=action, target=_target(evaluation), details=details)


@dataclass(frozen=True)
class _Work:
    """What the job needs, out of the database."""

    model_id: UUID
    title: str
    request: Mapping[str, Any]
    edits: Sequence[tuple[str, str]]
    """Source and first template of the first edits."""
    files: Sequence[StoredFile]


def _read(session: Session, evaluation_id: UUID) -> _Work:
    evaluation = session.get_one(Evaluation, evaluation_id)
    checkpoint = evaluation.checkpoint
    edits = queries.edits_in(session, checkpoint_id=checkpoint.id)
    return _Work(
        model_id=checkpoint.model_id,
        title=f"{checkpoint.model.name}: v{checkpoint.number} beside the base model",
        request=evaluation.request,
        edits=[(edit.source, edit.templates[0]) for edit in edits[:SHOWN_EDITS]],
        files=own_files(checkpoint),
    )


def _preview(
    context: JobContext, lease: Lease, work: _Work, pipeline: "EditablePipeline"
) -> tuple[JsonObject, list[StoredFile]]:
    """Every prompt at every seed, before and after, as one picture."""
    request = work.request
    prompts = request["prompts"] or [fill(template, source) for source, template in work.edits]
    controls, seeds = request["controls"], request["seeds"]
    drawn = (*prompts, *controls)
    total = 2 * len(drawn) * len(seeds)

    def draw(*, done: int) -> list[list["Image.Image"]]:
        rows: list[list[Image.Image]] = []
        for prompt in drawn:
            context.progress(lease, {"stage": "drawing", "done": done, "total": total})
            if context.cancelled(lease):
                raise Cancelled(f"stopped after {done} of {total} pictures")
            steps, guidance = request["steps"], request["guidance"]
            rows.append(editing.draw(pipeline, [prompt] * len(seeds), seeds=seeds, steps=steps, guidance=guidance))
            done += len(seeds)
        return rows

    before = draw(done=0)
    with _published(context.store, work.files, pipeline):
        after = draw(done=total // 2)
    rows = [editing.Row(prompt, "", *pictures) for prompt, *pictures in zip(drawn, before, after, strict=True)]
    sections = [("Edited", rows[: len(prompts)]), ("Controls", rows[len(prompts) :])]
    grid = io.BytesIO()
    editing.draw_grid(work.title, [section for section in sections if section[1]]).save(grid, format="PNG")
    report = {"prompts": list(prompts), "controls": list(controls), "seeds": list(seeds)}
    return report, [store_content(context.store, "before-after.png", grid.getvalue())]


@contextmanager
def _published(store: LocalStore, files: Sequence[StoredFile], pipeline: "EditablePipeline") -> Iterator[None]:
    """The pipeline with the version's own weights, each file checked against its sha256."""
    modules: dict[str, Any] = {encoder.name: encoder.model for encoder in pipeline.encoders}
    with ExitStack() as stack:
        for file in files:
            component, _, name = file.path.partition("/")
            if name in WEIGHTS:
                module = modules.get(component) or getattr(pipeline, component)
                stack.enter_context(editing.holding(module, store.verified(file.sha256)))
        yield


def _target(evaluation: Evaluation) -> str:
    checkpoint = evaluation.checkpoint
    return f"checkpoint:{checkpoint.model.name}/v{checkpoint.number}"
