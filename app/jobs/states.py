"""The states of domain rows that mirror whether their job waits or runs, as clients see them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.orm import Session

from app.db.models import Edit, Evaluation, JsonObject, Statistics

CANCELLED: JsonObject = {"title": "Cancelled", "detail": "It was cancelled on request.", "errors": []}
"""The problem of a job, and of its domain row, that ended because someone asked for it."""


def show(session: Session, *, kind: str, target_ids: Sequence[UUID], running: bool) -> None:
    """Show an edit as `optimizing` or `queued` again, statistics as `estimating`, an evaluation as `running`.

    Models and checkpoints have one state for both, `registering` and `building`. An edit that is `cancelling` stays so.
    """
    rows: dict[str, tuple[type[Edit | Statistics | Evaluation], str]] = {
        "optimize_edit": (Edit, "optimizing"),
        "estimate_statistics": (Statistics, "estimating"),
        "evaluate_checkpoint": (Evaluation, "running"),
    }
    if kind not in rows:
        return
    table, working = rows[kind]
    waits, runs = ("queued", working) if running else (working, "queued")
    session.execute(update(table).where(table.id.in_(target_ids), table.state == waits).values(state=runs))
