"""Which workers are alive: each says so every few seconds, by the database's clock."""

from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

import editing
from app.db.models import Worker

SEEN_SECONDS = 5.0
"""How often a worker says that it is there."""
ALIVE = timedelta(seconds=30)
FORGOTTEN = timedelta(days=1)


def seen(session: Session, *, name: str) -> None:
    """This worker is alive; workers that were not for a day are forgotten."""
    row = insert(Worker).values(name=name, version=editing.__version__)
    session.execute(row.on_conflict_do_update(index_elements=[Worker.name], set_={"seen_at": func.now()}))
    session.execute(delete(Worker).where(Worker.seen_at < func.now() - FORGOTTEN))


def left(session: Session, *, name: str) -> None:
    """This worker has ended by itself."""
    session.execute(delete(Worker).where(Worker.name == name))


def alive(session: Session) -> Mapping[str, int]:
    """How many workers of each version were seen of late."""
    found = select(Worker.version, func.count()).where(Worker.seen_at > func.now() - ALIVE)
    return dict(session.execute(found.group_by(Worker.version)).all())
