"""Workers whose clocks are an hour apart: a lease is held and runs out by the database's clock alone."""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.faults.conftest import LEASE_SECONDS, SLOW, Site, WorkerProcess

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


SHIFT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long shift(void) { return atol(getenv("CLOCK_SHIFT")); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return status;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec, now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture
def shifted_clock(tmp_path: Path) -> Path:
    """A library that sets the clock of the process that loads it off by CLOCK_SHIFT seconds, as a wrong NTP would.

    libfaketime does the same, but keeps the waits of Python's threads spinning.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "shift.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-o", str(library), "-", "-ldl"]
    subprocess.run(command, input=SHIFT, text=True, check=True)
    return library


def test_workers_with_wrong_clocks_take_no_live_lease(
    site: Site, shifted_clock: Path, outcome: Callable[..., None]
) -> None:
    """No work is taken from a worker that is alive, by whichever; from one that was killed once its lease is over."""

    def start(shift: str) -> WorkerProcess:
        given: dict[str, Any] = {"LD_PRELOAD": str(shifted_clock), "CLOCK_SHIFT": shift}
        worker = site.start_worker(**given, EMENDER_EDIT_BATCH_SIZE="1")
        worker.await_start()
        return worker

    workers = {"ahead": start("+3600"), "behind": start("-3600")}
    stamps = {name: worker.log.read_text().split('"timestamp": "')[-1][:13] for name, worker in workers.items()}
    assert stamps["ahead"] > stamps["behind"], "their clocks are not apart"

    ids = [UUID(site.post_edit(f"cat {number}", settings=SLOW).json()["id"]) for number in range(2)]
    jobs = [site.job_table.latest_job(edit_id) for edit_id in ids]
    for job_id in jobs:
        site.job_table.await_step(job_id)
    time.sleep(2 * LEASE_SECONDS)
    for job_id in jobs:
        assert site.job_table.job(job_id).attempt == 1, "it was taken from a worker that was alive"
    for job_id in jobs:
        site.job_table.await_state(job_id, "succeeded")
        assert site.job_table.job(job_id).attempt == 1

    edit_id = UUID(site.post_edit("old cat", settings=SLOW).json()["id"])
    job_id = site.job_table.latest_job(edit_id)
    site.job_table.await_step(job_id)
    holder = site.job_table.job(job_id).worker or ""
    (doomed,) = [worker for worker in workers.values() if holder.endswith(f"-{worker.pid}")]
    doomed.kill()
    killed = time.monotonic()
    site.job_table.await_step(job_id, attempt=2, timeout=60)
    recovery = time.monotonic() - killed
    assert recovery > LEASE_SECONDS / 2, "its lease was not waited for"
    site.job_table.await_state(job_id, "succeeded")
    tally = site.job_table.tally([*ids, edit_id])
    assert tally == {"lost": 0, "doubled": 0}
    outcome(21, "workers' clocks an hour ahead and behind, one killed", recovery=recovery, **tally)
