import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from app.db.models import Outbox
from app.jobs.dispatcher import dispatch
from app.jobs.enqueue import enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT
from app.jobs.notifier import BellBroken
from tests.app.jobs.conftest import RecordingBell


def left(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Outbox)) or 0


def test_rings_in_order_and_empties_the_outbox(session: Session, bell: RecordingBell) -> None:
    job_ids = enqueue_many(session, kind=OPTIMIZE_EDIT, targets=[(uuid7(), "test") for _ in range(3)])
    assert dispatch(session, bell=bell) == 3
    assert bell.rung == job_ids and left(session) == 0
    assert dispatch(session, bell=bell) == 0


def test_a_broken_bell_leaves_the_rows(session: Session, bell: RecordingBell) -> None:
    enqueue_many(session, kind=OPTIMIZE_EDIT, targets=[(uuid7(), "test")])
    bell.broken = True
    with pytest.raises(BellBroken):
        dispatch(session, bell=bell)
    assert left(session) == 1


def test_who_dies_before_the_commit_leaves_the_rows_to_the_next(clean_database: Engine, bell: RecordingBell) -> None:
    with Session(clean_database) as session:
        job_ids = enqueue_many(session, kind=OPTIMIZE_EDIT, targets=[(uuid7(), "test"), (uuid7(), "test")])
        session.commit()
    with Session(clean_database) as dying:
        assert dispatch(dying, bell=bell) == 2  # and no commit
    with Session(clean_database) as session:
        assert dispatch(session, bell=bell) == 2
        session.commit()
        assert left(session) == 0
    assert bell.rung == job_ids * 2


def test_two_at_once_share_the_rows(clean_database: Engine) -> None:
    with Session(clean_database) as session:
        enqueue_many(session, kind=OPTIMIZE_EDIT, targets=[(uuid7(), "test") for _ in range(4)])
        session.commit()
    ours, theirs = RecordingBell(), RecordingBell()
    with Session(clean_database) as first, Session(clean_database) as second:
        assert dispatch(first, bell=ours, limit=3) == 3
        assert dispatch(second, bell=theirs) == 1
        assert set(ours.rung).isdisjoint(theirs.rung)
