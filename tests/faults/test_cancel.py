"""Cancels that come at any moment of the work: each edit ends once, with a value or cancelled, never both."""

import random
import threading
import time
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.db.engine import sessions
from app.db.models import AuditEvent, Edit, Job
from app.edits.errors import EditHasEnded
from app.edits.service import cancel_edit
from app.settings import Settings
from app.storage.local import LocalStore
from app.worker.runner import Runner
from tests.faults.conftest import EVERY_STEP, Ledger

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(600)]


def test_cancel_against_every_moment(
    clean_database: Engine, database_url: str, roots: Path, tmp_path: Path, ledger: Ledger
) -> None:
    settings = Settings(
        folder=tmp_path / "var",
        database_url=SecretStr(database_url),
        model_roots=(roots,),
        poll_seconds=0.02,
        batch_size=4,
        device="cpu",
        torch_threads=1,
    )
    store, stopping = LocalStore(settings.store_folder), threading.Event()
    runner = Runner(settings=settings, sessions=sessions(clean_database), store=store, worker="w", stopping=stopping)
    ledger.register()
    assert runner.work()
    chance = random.Random(0)
    jobs = [ledger.add_edit(EVERY_STEP | {"steps": 30}, source=f"cat {n}") for n in range(24)]
    worker = threading.Thread(target=work_until_done, args=(runner,))
    worker.start()
    while worker.is_alive():
        with Session(clean_database) as session:
            edit_id = session.get_one(Job, chance.choice(jobs)).target_id
            try:
                cancel_edit(session, edit_id=edit_id, actor="test")
                session.commit()
            except EditHasEnded:
                session.rollback()
        time.sleep(chance.random() * 0.3)
    with Session(clean_database) as session:
        for job_id in jobs:
            job = session.get_one(Job, job_id)
            edit = session.get_one(Edit, job.target_id)
            assert (job.state, edit.state, len(edit.values)) in [
                ("succeeded", "ready", 1),
                ("cancelled", "cancelled", 0),
            ]
            query = select(AuditEvent.action).where(AuditEvent.target == f"edit:{edit.id}")
            endings = [action for action in session.scalars(query) if action in ("edit.ready", "edit.cancelled")]
            assert len(endings) <= 1  # one cancelled while queued was ended by the cancel itself
        states = set(session.scalars(select(Edit.state)))
    assert states == {"ready", "cancelled"}, "the moments were badly chosen: all ended alike"


def work_until_done(runner: Runner) -> None:
    while runner.work():
        pass
