"""The registry of job kinds: what each works on, where its code is, and the states it gives to its resource."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class JobKind:
    """One kind of job. `jobs.target_id` is the id of the row of `table` that it works on."""

    name: str
    resource: str
    """The word for the row in audit actions: `edit` gives `edit.ready`."""
    table: str
    task: str
    """The module with the code. Only workers import it."""
    queued: str
    """The state of the row while the job is queued."""
    running: str
    done: str
    """The state of the row once the job has succeeded."""
    batches: bool = False
    """Whether one worker takes several jobs of one model at once."""
    queue: Literal["work", "deliveries"] = "work"
    """Deliveries have threads of their own, so that a slow receiver delays no other work."""
    max_attempts: int | None = None
    """Attempts before the job is failed. None: EMENDER_MAX_ATTEMPTS."""
    audited: bool = True
    """Whether the resource keeps the job's problem and its end is an audit event."""


REGISTER_MODEL = JobKind(
    name="register_model",
    resource="model",
    table="base_models",
    task="app.worker.tasks.register_model",
    queued="registering",
    running="registering",
    done="ready",
)
ESTIMATE_STATISTICS = JobKind(
    name="estimate_statistics",
    resource="statistics",
    table="statistics",
    task="app.worker.tasks.estimate_statistics",
    queued="queued",
    running="estimating",
    done="ready",
)
OPTIMIZE_EDIT = JobKind(
    name="optimize_edit",
    resource="edit",
    table="edits",
    task="app.worker.tasks.optimize_edits",
    queued="queued",
    running="optimizing",
    done="ready",
    batches=True,
)
BUILD_CHECKPOINT = JobKind(
    name="build_checkpoint",
    resource="checkpoint",
    table="checkpoints",
    task="app.worker.tasks.build_checkpoint",
    queued="building",
    running="building",
    done="published",
)
EVALUATE_CHECKPOINT = JobKind(
    name="evaluate_checkpoint",
    resource="evaluation",
    table="evaluations",
    task="app.worker.tasks.evaluate_checkpoint",
    queued="queued",
    running="running",
    done="ready",
)

DELIVER_WEBHOOK = JobKind(
    name="deliver_webhook",
    resource="delivery",
    table="webhook_deliveries",
    task="app.worker.tasks.deliver_webhook",
    queued="pending",
    running="pending",
    done="delivered",
    queue="deliveries",
    max_attempts=10,
    audited=False,
)

KINDS = {
    kind.name: kind
    for kind in (
        REGISTER_MODEL,
        ESTIMATE_STATISTICS,
        OPTIMIZE_EDIT,
        BUILD_CHECKPOINT,
        EVALUATE_CHECKPOINT,
        DELIVER_WEBHOOK,
    )
}
