"""The states of domain rows that mirror whether their job waits or runs, as clients see them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.orm import Session

from app.db.models import Edit, JsonObject, Statistics

CANCELLED: JsonObject = {"title": "Cancelled", "detail": "It was cancelled on request.", "errors": []}
"""The problem of a job, and of its domain row, that ended because someone asked for it."""


def show(session: Session, *, kind: str, target_ids: Sequence[UUID], running: bool) -> None:
    """Show an edit as `optimizing` or `queued` again, statistics as `estimating` or `queued` again.

    Models and checkpoints have one state for both, `registering` and `building`. An edit that is `cancelling` stays so.
    """
    if kind == "optimize_edit":
        waits, runs = ("queued", "optimizing") if running else ("optimizing", "queued")
        session.execute(update(Edit).where(Edit.id.in_(target_ids), Edit.state == waits).values(state=runs))
    elif kind == "estimate_statistics":
        waits, runs = ("queued", "estimating") if running else ("estimating", "queued")
        session.execute(
            update(Statistics).where(Statistics.id.in_(target_ids), Statistics.state == waits).values(state=runs)
        )
