"""What the audit log says of a job that ended."""

from sqlalchemy.orm import Session

from app.audit.service import record
from app.db.models import JsonObject


def record_state(session: Session, *, noun: str, target: str, was: str, state: str, details: JsonObject) -> None:
    """That a worker took a row of this noun from one state to another."""
    record(
        session,
        actor="worker",
        action=f"{noun}.{state}",
        target=target,
        details=details,
        before={"state": was},
        after={"state": state},
    )
