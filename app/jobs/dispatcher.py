"""Rings the bell for what was committed. Runs in every worker; any number may run at once."""

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.db.models import Outbox
from app.jobs.notifier import Bell


def dispatch(session: Session, *, bell: Bell, limit: int = 1000) -> int:
    """Announce the oldest rows of the outbox and delete them; returns how many there were.

    The caller commits. Whoever dies in between, or finds the bell broken (`BellBroken`), leaves the rows to the next:
    a job may be announced twice, and is claimed once.
    """
    rows = session.execute(
        select(Outbox.id, Outbox.job_id).order_by(Outbox.id).limit(limit).with_for_update(skip_locked=True)
    ).all()
    if rows:
        bell.ring([row.job_id for row in rows])
        session.execute(delete(Outbox).where(Outbox.id.in_([row.id for row in rows])))
    return len(rows)
