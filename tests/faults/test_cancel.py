"""Cancels that come at any moment of the work: each edit ends once, with a value or cancelled, never both."""

import random
import time
from collections import Counter
from collections.abc import Callable
from uuid import UUID

import pytest
from sqlalchemy import select

from app.db.models import AuditEvent, Edit
from tests.faults.conftest import EVERY_STEP, Site

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_cancel_at_any_time_leaves_job_and_edit_consistent(site: Site, outcome: Callable[..., None]) -> None:
    worker = site.start_worker(EMENDER_EDIT_BATCH_SIZE="4", EMENDER_POLL_INTERVAL_SECONDS="0.02")
    worker.await_start()
    chance = random.Random(0)
    settings = EVERY_STEP | {"optimization_steps": 30}
    ids = [UUID(site.post_edit(f"cat {number}", settings=settings).json()["id"]) for number in range(24)]
    waiting, answers = set(ids), Counter[int]()
    while waiting:
        edit_id = chance.choice(ids)
        answers[site.ask("POST", f"/v1/edits/{edit_id}/cancel").status_code] += 1
        time.sleep(chance.random() * 0.3)
        with site.sessions() as session:
            ended = select(Edit.id).where(Edit.state.in_(("ready", "failed", "cancelled")))
            waiting -= set(session.scalars(ended))
    with site.sessions() as session:
        for edit_id in ids:
            edit = session.get_one(Edit, edit_id)
            job = site.job_table.job(site.job_table.latest_job(edit_id))
            assert (job.state, edit.state, edit.value is not None) in [
                ("succeeded", "ready", True),
                ("cancelled", "cancelled", False),
            ]
            query = select(AuditEvent.action).where(AuditEvent.target == f"edit:{edit.id}")
            endings = [action for action in session.scalars(query) if action in ("edit.ready", "edit.cancelled")]
            assert len(endings) <= 1  # one cancelled while queued was ended by the cancel itself
        states = Counter(session.scalars(select(Edit.state)))
    assert set(states) == {"ready", "cancelled"}, "the moments were badly chosen: all ended alike"
    assert set(answers) <= {200, 202, 409}
    note = f"{states['ready']} ready with one value, {states['cancelled']} cancelled with none"
    outcome(11, "cancels at any moment of 24 edits", note=note, **site.job_table.tally(ids))
