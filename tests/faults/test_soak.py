"""Random kills of everything under a steady load: nothing accepted is lost, nothing is done twice."""

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import func, select

from app.audit.service import verify
from app.db.models import AliasMove, AuditEvent, Checkpoint, Edit, Job
from app.local.embedded_postgres import EmbeddedPostgres
from app.signing.keys import read_key
from app.storage.scrub import scrub
from emender import pull
from tests.faults.conftest import LEASE_SECONDS, QUICK, Site, WorkerProcess, own_site, postmaster, until
from tests.faults.outcomes import Outcomes
from tests.patience import patience
from tests.servers import RedisServer

pytestmark = [pytest.mark.fault, pytest.mark.soak, pytest.mark.timeout(0)]

WORKERS = 3
PAUSE = (2.0, 12.0)  # seconds between two faults
DRAIN = 600.0


class Load:
    """Clients in threads: they edit, cancel, apply, move the alias and pull while servers fail."""

    def __init__(self, site: Site, *, seed: int) -> None:
        self.site = site
        self.operations: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        """What a request was told, or how it broke, before it was sent again."""
        self.unexpected: list[str] = []
        self.edits: list[UUID] = []
        self.versions: list[str] = []
        self._seed = seed
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(name, work, pause), name=name)
            for name, work, pause in [
                ("edit 1", self._edit, 1.0),
                ("edit 2", self._edit, 1.0),
                ("apply", self._apply, 12.0),
                ("move", self._move, 3.0),
                ("pull", self._pull, 6.0),
            ]
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()

    def end(self) -> None:
        """Let each finish what it has begun: a POST is sent until it is answered."""
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), f"{thread.name} hangs"

    def _run(self, name: str, work: Callable[[random.Random], None], pause: float) -> None:
        chance = random.Random(f"{self._seed} {name}")
        while not self._ended.wait(chance.uniform(0, 2 * pause)):
            try:
                work(chance)
            except Exception as error:
                self.unexpected.append(f"{name}: {type(error).__name__}: {error}")

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Until it is answered; a POST is sent under a key."""
        if method == "POST":
            options["headers"] = {"Idempotency-Key": secrets.token_hex(8)}
        while True:
            try:
                answer = self.site.ask(method, path, **options)
            except httpx.TransportError as error:
                self.retries[type(error).__name__] += 1
            else:
                if answer.status_code != 503 and not (method == "POST" and "Retry-After" in answer.headers):
                    if answer.status_code >= 500:
                        self.unexpected.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
                    return answer
                self.retries[str(answer.status_code)] += 1
            time.sleep(0.3)

    def _edit(self, chance: random.Random) -> None:
        body = {"source": f"cat {len(self.edits)} {chance.random()}", "destination": {"prompt": "dog"}}
        body |= {"templates": ["a {}"], "settings": QUICK}
        answer = self._ask("POST", "/v1/models/tiny/edits", json=body)
        assert answer.status_code == 202, answer.text
        self.operations["edits"] += 1
        self.edits.append(UUID(answer.json()["id"]))
        if chance.random() < 0.1:
            answer = self._ask("POST", f"/v1/edits/{self.edits[-1]}/cancel")
            assert answer.status_code in (200, 202, 409), answer.text
            self.operations["cancels"] += 1

    def _apply(self, chance: random.Random) -> None:
        ready = self._ask("GET", "/v1/edits?state=ready&limit=40").json()["items"]
        if not ready:
            return
        chosen = chance.sample([edit["id"] for edit in ready], k=min(len(ready), 5))
        alias = {"alias": "production"} if chance.random() < 0.5 else {}
        answer = self._ask("POST", "/v1/models/tiny/apply", json={"edits": chosen} | alias)
        assert answer.status_code == 202, answer.text
        self.operations["applies"] += 1
        self.versions.append(answer.json()["version"])

    def _move(self, chance: random.Random) -> None:
        items = self._ask("GET", "/v1/models/tiny/checkpoints?limit=20").json()["items"]
        published = [item["version"] for item in items if item["state"] == "published"]
        if not published:
            return
        found = self._ask("GET", "/v1/models/tiny/aliases/production")
        headers = {"If-Match": found.headers["ETag"]} if found.status_code == 200 else {}
        path = "/v1/models/tiny/aliases/production"
        answer = self._ask("PUT", path, json={"version": chance.choice(published)}, headers=headers)
        assert answer.status_code in (200, 201, 412, 428), answer.text
        self.operations["alias moves"] += answer.status_code < 300

    def _pull(self, chance: random.Random) -> None:
        """Run `pull.py`, which verifies the signature and the digests before it changes a link."""
        token = self.site.keys["read"]["Authorization"].removeprefix("Bearer ")
        command = [sys.executable, "-I", pull.__file__, "--endpoint", self.site.api.url]
        command += ["--model", "emender/tiny", "--revision", "production", "--folder", str(self.site.folder / "fleet")]
        command += ["--key", str(self.site.folder / "public.pem")]
        done = subprocess.run(
            command, env={"EMENDER_API_KEY": token}, capture_output=True, text=True, timeout=patience(300)
        )
        nothing_yet = done.returncode == 5 and not self.operations["pulls"]
        if done.returncode == 0:
            self.operations["pulls"] += 1
        elif done.returncode == 3 or nothing_yet:
            self.retries[f"pull.py {done.returncode}"] += 1
        else:
            self.unexpected.append(f"pull.py: {done.returncode}: {done.stderr}")


class Faults:
    """Kills what runs, by chance, and starts it again. In the main thread, whose end the kernel watches."""

    def __init__(self, site: Site, postgres: EmbeddedPostgres, redis: RedisServer, *, seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self._site, self._postgres, self._redis = site, postgres, redis
        self._chance = random.Random(seed)
        self._workers = [site.start_worker() for _ in range(WORKERS)]
        self._stopped: list[tuple[float, WorkerProcess]] = []

    def await_workers(self) -> None:
        for worker in self._workers:
            worker.await_start()

    def run(self, *, seconds: float) -> None:
        end = time.monotonic() + seconds
        faults = {self.kill_worker: 4, self.stop_worker: 1, self.kill_api: 2, self.kill_redis: 2, self.kill_postgres: 1}
        while time.monotonic() < end:
            time.sleep(min(self._chance.uniform(*PAUSE), max(0.0, end - time.monotonic())))
            self._continue()
            (fault,) = self._chance.choices(list(faults), list(faults.values()))
            fault()
        self._continue(all_of_them=True)

    def kill_worker(self) -> None:
        """Return a worker that has started."""
        working = [worker for worker in self._workers if worker.says("worker started")]
        if len(working) < 2:
            return
        doomed = self._chance.choice(working)
        doomed.kill()
        self._workers[self._workers.index(doomed)] = self._site.start_worker()
        self.kills["worker"] += 1

    def stop_worker(self) -> None:
        """SIGSTOP, and SIGCONT once its leases are over."""
        worker = self._chance.choice(self._workers)
        worker.send(signal.SIGSTOP)
        self._stopped.append((time.monotonic() + 2 * LEASE_SECONDS, worker))
        self.kills["worker stopped and continued"] += 1

    def kill_api(self) -> None:
        self._site.api.kill()
        self._site.api.start()
        self.kills["API"] += 1

    def kill_redis(self) -> None:
        self._redis.kill()
        time.sleep(self._chance.uniform(0, 8))
        self._redis.start()
        self.kills["Redis"] += 1

    def kill_postgres(self) -> None:
        os.kill(postmaster(self._postgres), signal.SIGKILL)
        until(lambda: not self._postgres.is_running, timeout=60)
        self._postgres.start()
        self.kills["Postgres"] += 1

    def _continue(self, *, all_of_them: bool = False) -> None:
        for due, worker in list(self._stopped):
            if all_of_them or time.monotonic() > due:
                if worker.status is None:
                    worker.send(signal.SIGCONT)
                self._stopped.remove((due, worker))


def test_random_faults_under_load_lose_and_double_nothing(
    base_folder: Path, tmp_path: Path, redis_server: RedisServer, request: pytest.FixtureRequest
) -> None:
    seconds = request.config.getoption("--soak-seconds")
    seed = request.config.getoption("--soak-seed")
    seed = secrets.randbelow(10**6) if seed is None else seed
    outcomes: Outcomes = request.config.stash[Outcomes.KEY]
    outcomes.soak = f"seed {seed}: failed"
    with own_site(tmp_path, base_folder, redis_url=redis_server.url) as (site, postgres):
        (site.folder / "public.pem").write_text(read_key(site.key_file).public_pem)
        faults, load = Faults(site, postgres, redis_server, seed=seed), Load(site, seed=seed)
        faults.await_workers()
        with load.running():
            faults.run(seconds=seconds)
        load.end()
        with site.sessions() as session:
            waiting = select(func.count()).select_from(Job).where(Job.state.in_(("queued", "running")))

            def is_done() -> bool:
                left = session.scalar(waiting)
                session.rollback()
                return not left

            recovery = until(is_done, timeout=DRAIN, every=0.5)
        assert load.unexpected == []

        tally = site.job_table.tally(load.edits)
        with site.sessions() as session:
            edits = session.scalar(select(func.count()).select_from(Edit))
            versions = session.scalars(select(Checkpoint).order_by(Checkpoint.number)).all()
            chain = verify(session)
            moves = session.scalar(select(func.count()).select_from(AliasMove))
            told = session.scalar(select(func.count()).where(AuditEvent.action == "alias.move"))
            states = Counter(session.scalars(select(Edit.state)))
        assert (edits, len(versions)) == (len(load.edits), len(load.versions)), "done twice, or done and not answered"
        assert [f"v{version.number}" for version in versions] == sorted(load.versions, key=lambda name: int(name[1:]))
        assert {version.state for version in versions} <= {"published", "failed"}
        assert moves == told
        assert chain.valid, chain.reason
        published = [f"v{version.number}" for version in versions if version.state == "published"]
        broken = {version: problem for version in published if (problem := site.problem(version))}
        assert broken == {}
        assert scrub(site.sessions, site.store, actor="test").is_clean
        assert tally == {"lost": 0, "doubled": 0}
    lines = [
        f"{seconds:.0f} seconds, seed {seed}: {load.operations.total()} operations ({listed(load.operations)}),",
        f"{faults.kills.total()} faults ({listed(faults.kills)}),",
        f"**lost {tally['lost']}, doubled {tally['doubled']}**.",
        "",
        f"Edits: {listed(states)}. {len(published)} of {len(versions)} versions were published; every file verified",
        f"with manifest and signature. The audit chain of {chain.events} events is whole. The queue was empty",
        f"{recovery:.0f} s after the last fault. Clients retried after: {listed(load.retries)}.",
    ]
    outcomes.soak = "\n".join(lines) + "\n"


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
