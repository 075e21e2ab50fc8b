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
    running: str
    """The state of the row while the job is running."""
    queued: str = "queued"
    """The state of the row while the job is queued."""
    done: str = "ready"
    """The state of the row once the job has succeeded."""
    batches: bool = False
    """Whether one worker takes several jobs of one model at once."""
    queue: Literal["work", "deliveries"] = "work"
    """Deliveries have threads of their own, so that a slow receiver delays no other work."""
    max_attempts: int | None = None
    """Attempts before the job is failed. None: EMENDER_MAX_ATTEMPTS."""
    audited: bool = True
    """Whether the resource keeps the job's problem and its end is an audit event."""

    @property
    def task(self) -> str:
        """The module with the code. Only workers import it."""
        return f"app.worker.tasks.{self.name}"


REGISTER_MODEL = JobKind(
    "register_model", resource="model", table="base_models", queued="registering", running="registering"
)
ESTIMATE_STATISTICS = JobKind("estimate_statistics", resource="statistics", table="statistics", running="estimating")
OPTIMIZE_EDIT = JobKind("optimize_edit", resource="edit", table="edits", running="optimizing", batches=True)
BUILD_CHECKPOINT = JobKind(
    "build_checkpoint",
    resource="checkpoint",
    table="checkpoints",
    queued="building",
    running="building",
    done="published",
)
EVALUATE_CHECKPOINT = JobKind("evaluate_checkpoint", resource="evaluation", table="evaluations", running="running")
DELIVER_WEBHOOK = JobKind(
    "deliver_webhook",
    resource="delivery",
    table="webhook_deliveries",
    queued="pending",
    running="pending",
    done="delivered",
    queue="deliveries",
    max_attempts=10,
    audited=False,
)

_ALL = (REGISTER_MODEL, ESTIMATE_STATISTICS, OPTIMIZE_EDIT, BUILD_CHECKPOINT, EVALUATE_CHECKPOINT, DELIVER_WEBHOOK)
KINDS = {kind.name: kind for kind in _ALL}
