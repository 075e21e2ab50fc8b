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
    from editing.stage_one.optimize import StageOneProgress, Value

log = structlog.get_logger()


def run(context: JobContext, leases: Sequence[Lease]) -> None:
    """Optimize the values of these edits, all of one model. Each succeeds or fails by itself."""
    with context.sessions() as session:
        query = select(Edit).where(Edit.id.in_([lease.target_id for lease in leases]))
        rows = {edit.id: edit for edit in session.scalars(query)}
    pipeline = context.pipeline(rows[leases[0].target_id].model_id)

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
) -> Sequence["Value | Exception"]:
    """Return an outcome for each edit. A batch that fails, perhaps for lack of memory, is retried edit by edit."""

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
    context: JobContext, lease: Lease, edit: editing.ConceptEdit, value: "Value", *, model_id: UUID
) -> tuple["Value | Exception", JsonObject | None]:
    """Mix the values of a balance. A failure does not affect other edits."""
    try:
        with STAGE_SECONDS.labels("balance").time():
            return balance(context, lease, edit, value, model_id=model_id)
    except EditingError as error:
        return error, None
    except Exception as error:
        log.exception("balancing failed unexpectedly")
        return error, None


def _conclude(
    context: JobContext, lease: Lease, outcome: "Value | Exception", *, balance: JsonObject | None = None
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
        for part in outcome.parts:
            for loss, losses in (("text", part.text_losses), ("noise", part.noise_losses)):
                if losses:
                    FINAL_LOSS.labels(loss).observe(losses[-1])
    except Cancelled:
        return
    except LeaseLost as error:
        log.warning("result refused: the lease was lost", lease=str(error))


def _write(session: Session, lease: Lease, value: "Value", balance: JsonObject | None) -> None:
    rows = [_row(lease, part, balance) for part in value.parts]
    session.add_all(rows)
    details: JsonObject = {"value": rows[0].sha256}
    if len(rows) > 1:
        details["values"] = {row.encoder: row.sha256 for row in rows}
    end_resource(session, lease=lease, state=lease.kind.done, details=details)


def _row(lease: Lease, value: "Value", balance: JsonObject | None) -> EditValue:
    content = value.to_bytes()  # δ, then h
    half = len(content) // 2
    return EditValue(
        edit_id=lease.target_id,
        encoder=value.encoder,
        layer=value.layer,
        delta=content[:half],
        hidden=content[half:],
        sha256=hashlib.sha256(content).hexdigest(),
        losses={
            "text": list(value.text_losses),
            "noise": list(value.noise_losses),
            "delta_norm": value.delta_norm,
            "hidden_norm": value.hidden_norm,
            "settings": dict(value.settings),
            "balance": balance,
        },
        attempt=lease.attempt,
        engine=value.engine_version,
    )
