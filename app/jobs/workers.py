"""The workers that are alive: each writes a row every few seconds, by the database's clock."""

from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

import editing
from app.db.models import Worker

SEEN_SECONDS = 5.0
"""How often a worker writes its row."""
ALIVE = timedelta(seconds=30)
FORGOTTEN = timedelta(days=1)


def sign_on(session: Session, *, name: str) -> None:
    """Write that this worker is alive, and delete workers that were not for a day."""
    row = insert(Worker).values(name=name, version=editing.__version__)
    session.execute(row.on_conflict_do_update(index_elements=[Worker.name], set_={"seen_at": func.now()}))
    session.execute(delete(Worker).where(Worker.seen_at < func.now() - FORGOTTEN))


def sign_off(session: Session, *, name: str) -> None:
    """Delete the row of a worker that ends."""
    session.execute(delete(Worker).where(Worker.name == name))


def count_alive(session: Session) -> Mapping[str, int]:
    """Count the workers that are alive, by version."""
    found = select(Worker.version, func.count()).where(Worker.seen_at > func.now() - ALIVE)
    return dict(session.execute(found.group_by(Worker.version)).all())
