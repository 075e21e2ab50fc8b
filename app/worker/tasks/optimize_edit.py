"""Stage I for the edits of one model: from their rows to their values, in one batch."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

import editing
from app.db.models import Edit, EditValue, JsonObject
from app.jobs.leases import Lease, LeaseLost
from app.jobs.states import end_resource
from app.observability.metrics import FINAL_LOSS, STAGE_SECONDS
from app.storage.store import BlobCorrupt, BlobMissing
from app.worker.edits import concept_edit
from app.worker.problems import problem_of
from app.worker.runner import JobContext
from app.worker.tasks.balance import balance
from editing.errors import Cancelled, EditingError

if TYPE_CHECKING:
    from editing.pipelines import EditablePipeline
    from editing.stage_one.optimize import StageOneProgress

log = structlog.get_logger()


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Optimize the values of these edits, all of one model. Each succeeds or fails by itself."""
    with context.sessions() as session:
        query = select(Edit).where(Edit.id.in_([lease.target_id for lease in leases]))
        rows = {edit.id: edit for edit in session.scalars(query)}
    pipeline = context.pipelines.get(rows[leases[0].target_id].model_id)

    chosen: list[Lease] = []
    edits: list[editing.ConceptEdit] = []
    for lease in leases:
        try:
            edits.append(concept_edit(rows[lease.target_id], store=context.store))
            chosen.append(lease)
        except (EditingError, BlobMissing, BlobCorrupt) as error:
            _conclude(context, lease, error)
    outcomes = list(zip(chosen, edits, _optimize(context, pipeline, chosen, edits), strict=True))
    for lease, edit, outcome in sorted(outcomes, key=lambda each: isinstance(each[1].destination, editing.Balance)):
        found: JsonObject | None = None  # what takes its pictures comes last
        if isinstance(edit.destination, editing.Balance) and not isinstance(outcome, Exception):
            outcome, found = _balance(context, lease, edit, outcome, model_id=rows[lease.target_id].model_id)
        _conclude(context, lease, outcome, balance=found)


def _optimize(
    context: JobContext, pipeline: "EditablePipeline", leases: Sequence[Lease], edits: Sequence[editing.ConceptEdit]
) -> Sequence["editing.EditValue | Exception"]:
    """Return an outcome for each edit. A batch that fails, as for lack of memory, is retried edit by edit."""

    def progress(now: "StageOneProgress") -> None:
        losses = {"text_loss": now.text_loss, "noise_loss": now.noise_loss}
        context.report(leases[now.edit_index], "optimizing", now.step, now.steps, **losses)

    try:
        with STAGE_SECONDS.labels("stage_one").time():
            return editing.optimize_values(
                pipeline, edits, progress=progress, cancelled=lambda index: context.should_stop(leases[index])
            )
    except Exception as error:
        log.exception("optimization failed unexpectedly", edits=len(edits))
        if len(edits) == 1:
            return [error]
    pairs = zip(leases, edits, strict=True)
    return [outcome for lease, edit in pairs for outcome in _optimize(context, pipeline, [lease], [edit])]


def _balance(
    context: JobContext, lease: Lease, edit: editing.ConceptEdit, value: "editing.EditValue", *, model_id: UUID
) -> tuple["editing.EditValue | Exception", JsonObject | None]:
    """Mix the values of a balance. A failure does not affect other edits."""
    try:
        with STAGE_SECONDS.labels("balance").time():
            return balance(context, lease, edit, value, model_id=model_id)
    except Exception as error:
        if not isinstance(error, EditingError):
            log.exception("balancing failed unexpectedly")
        return error, None


def _conclude(
    context: JobContext, lease: Lease, outcome: "editing.EditValue | Exception", *, balance: JsonObject | None = None
) -> None:
    """Write one edit's outcome. The runner ends a cancelled one; another attempt ends one whose lease was lost."""
    try:
        if isinstance(outcome, Cancelled):
            return
        if isinstance(outcome, Exception):
            context.fail(lease, problem_of(outcome))
            return
        with context.result(lease) as session:
            _write(session, lease, outcome, balance)
        for loss, losses in (("text", outcome.text_losses), ("noise", outcome.noise_losses)):
            if losses:
                FINAL_LOSS.labels(loss).observe(losses[-1])
    except Cancelled:
        return
    except LeaseLost as error:
        log.warning("result refused: the lease was lost", lease=str(error))


def _write(session: Session, lease: Lease, value: "editing.EditValue", balance: JsonObject | None) -> None:
    content = value.to_safetensors()
    sha256 = hashlib.sha256(content).hexdigest()
    session.add(
        EditValue(
            edit_id=lease.target_id,
            content=content,
            sha256=sha256,
            encoders=[
                {"name": name, "layer": own.layer, "delta_norm": own.delta_norm, "hidden_norm": own.hidden_norm}
                for name, own in value.encoders.items()
            ],
            losses={"text": list(value.text_losses), "noise": list(value.noise_losses)},
            balance=balance,
            attempt=lease.attempt,
            engine=value.engine_version,
        )
    )
    end_resource(session, lease=lease, state=lease.kind.done, details={"value": sha256})
