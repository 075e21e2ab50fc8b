"""The newest migration, up and down, under the load of the code that came before it; and that code beside ours."""

import io
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from app.db.migrate import ROOT, upgrade
from tests.faults.conftest import QUICK, Site, own_site, until
from tests.servers import ApiServer

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def config() -> Config:
    found = Config()
    found.set_main_option("script_location", str(ROOT / "migrations"))
    return found


def downgrade(engine: Engine, revision: str) -> None:
    with engine.connect() as connection:
        given = config()
        given.attributes["connection"] = connection
        command.downgrade(given, revision)
        connection.commit()


@pytest.fixture
def old_code(tmp_path: Path) -> Path:
    """Our code as it was before the newest migration."""
    script = ScriptDirectory.from_config(config()).get_revision("head")
    if getattr(script.module, "breaking", False):
        pytest.skip("the newest migration needs the service to be stopped")
    newest = script.path
    git = ["git", "-C", str(ROOT)]
    log = [*git, "log", "--diff-filter=A", "--format=%H", "--", newest]
    added = subprocess.run(log, capture_output=True, text=True).stdout.split()
    packed = subprocess.run([*git, "archive", f"{added[0]}^"], capture_output=True) if added else None
    if packed is None or packed.returncode:
        pytest.skip("needs the history of the repository, back to before the newest migration")
    folder = tmp_path / "old"
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Load:
    """Clients that read and write without a pause, and count the statuses of what they are answered."""

    def __init__(self, site: Site, api: ApiServer) -> None:
        self.statuses: Counter[int] = Counter()
        self.accepted: list[UUID] = []
        self._site, self._api = site, api
        self._ended = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def go_on(self) -> None:
        """Until some more edits were accepted."""
        count = len(self.accepted)
        until(lambda: len(self.accepted) > count + 10, timeout=60)

    def _ask(self, number: int) -> None:
        body = {"destination": {"prompt": "dog"}, "templates": ["a {}"], "settings": QUICK}
        with httpx.Client(
            base_url=self._api.url, headers=self._site.keys["admin"], trust_env=False, timeout=60
        ) as client:
            for turn in range(10**6):
                if self._ended.is_set():
                    return
                answers = [
                    client.post("/v1/models/tiny/edits", json=body | {"source": f"cat {number} {turn}"}),
                    client.get("/v1/edits?limit=10"),
                    client.get("/emender/tiny/resolve/production/README.md"),
                    client.get("/v1/audit?limit=10"),
                    client.get("/readyz"),
                ]
                self.statuses.update(answer.status_code for answer in answers)
                if answers[0].status_code == 202:
                    self.accepted.append(UUID(answers[0].json()["id"]))
                time.sleep(0.05)


def test_old_code_serves_while_migrations_run(
    base_folder: Path, tmp_path: Path, old_code: Path, outcome: Callable[..., None]
) -> None:
    script = ScriptDirectory.from_config(config()).get_revision("head")
    previous = script.down_revision
    assert isinstance(previous, str)
    with own_site(tmp_path, base_folder) as (site, _):
        site.ready_edit("fox")
        site.publish(edits="ready", alias="production")
        old = ApiServer(site.settings, log=site.folder / "old.log", folder=old_code)
        downgrade(site.engine, previous)
        old.start()
        worker = site.start_worker(code=old_code)
        worker.await_start()
        load = Load(site, old)
        began = time.monotonic()
        with load.running():
            for _ in range(3):
                load.go_on()
                upgrade(site.engine)
                load.go_on()
                downgrade(site.engine, previous)
            upgrade(site.engine)
            load.go_on()
        took = time.monotonic() - began
        assert set(load.statuses) == {200, 202}
        old.stop()
        new = [UUID(site.post_edit(f"new {number}").json()["id"]) for number in range(5)]
        every = [*load.accepted, *new]
        until(lambda: site.job_table.tally(every)["lost"] == 0, timeout=240, every=1)
        assert site.job_table.tally(every) == {"lost": 0, "doubled": 0}
        assert site.job_table.job(site.job_table.latest_job(new[-1])).worker.endswith(f"-{worker.pid}")  # type: ignore[union-attr]
        note = f"{load.statuses.total()} requests in {took:.0f} s, no 5xx; the old worker does the new API's edits"
        outcome(22, f"migration {script.revision} up and down, four times, under load", note=note)
