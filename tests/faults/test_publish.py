"""A publication killed at each of its steps, or one that finds the disk full: the old version is served throughout."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from PIL import Image
from sqlalchemy import Engine

from app.local.child_process import die_with_parent
from app.storage.scrub import scrub
from tests.faults.conftest import Site, until
from tests.faults.dying_worker import STEPS
from tests.servers import environment

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

WEIGHTS = "text_encoder/model.safetensors"
IN_EVERY_RUN = ("alias",)


class Reader:
    """A client that asks for the alias's weights again and again, in a thread."""

    def __init__(self, site: Site) -> None:
        self.statuses: set[int] = set()
        self.seen: list[tuple[str, str]] = []
        """The commit and the sha256 of the bytes, of each answer."""
        self._site = site
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def commits(self) -> list[str]:
        """Those that were served, each as often as it came up anew."""
        found = [commit for commit, _ in self.seen]
        return [commit for before, commit in zip(["", *found], found, strict=False) if commit != before]

    def _read(self) -> None:
        url = f"{self._site.api.url}/emender/tiny/resolve/production/{WEIGHTS}"
        with httpx.Client(headers=self._site.keys["read"], trust_env=False, timeout=60) as client:
            while not self._ended.wait(0.05):
                answer = client.get(url)
                self.statuses.add(answer.status_code)
                if answer.is_success:
                    assert answer.headers["ETag"].strip('"') == hashlib.sha256(answer.content).hexdigest()
                    self.seen.append((answer.headers["X-Repo-Commit"], answer.headers["ETag"].strip('"')))


def publish_first(site: Site) -> str:
    """A version that the alias `production` points at; its commit."""
    site.ready_edit("fox")
    return site.publish(edits="ready", alias="production")["commit"]  # type: ignore[no-any-return]


def collect(site: Site) -> dict[str, int]:
    """`emender storage collect`, with everything in the store put a day ago."""
    past = (datetime.now(UTC) - timedelta(days=1)).timestamp()
    for path in site.store.folder.rglob("*"):
        if path.is_file():
            os.utime(path, (past, past))
    done = subprocess.run(
        [sys.executable, "-m", "app.cli.main", "storage", "collect", "--grace", "1", "--json"],
        env=environment(site.settings),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "step", [step if step in IN_EVERY_RUN else pytest.param(step, marks=pytest.mark.long) for step in STEPS]
)
def test_a_publication_killed_at_any_step_is_published_once(
    site: Site, step: str, outcome: Callable[..., None]
) -> None:
    first = publish_first(site)
    site.ready_edit("owl")
    with Reader(site) as reader:
        version = site.apply(edits="ready", alias="production")
        doomed = site.start_worker(["tests.faults.dying_worker", step])
        until(lambda: doomed.status is not None, timeout=240)
        killed = time.monotonic()
        assert doomed.status == -9, doomed.log.read_text()[-3000:]
        done = step == "committed"
        assert site.version(version)["state"] == ("published" if done else "building")
        assert site.alias() == (version if done else "v1")
        left = list(site.store.folder.glob("incoming-*"))
        assert len(left) == (step in ("write", "fsync", "rename"))
        site.start_worker()
        made = site.await_version(version)
        recovery = time.monotonic() - killed
        until(lambda: reader.seen and reader.seen[-1][0] == made["commit"], timeout=30)
    assert (reader.statuses, reader.commits) == ({200}, [first, made["commit"]])
    job = site.job_table.build_job(version)
    assert (made["state"], job.attempt, site.alias()) == ("published", 1 if done else 2, version)
    assert site.job_table.count("checkpoint.published") == 2
    assert collect(site)["temporary_files"] == len(left)
    assert not list(site.store.folder.glob("incoming-*"))
    assert scrub(site.sessions, site.store, actor="test").is_clean
    assert site.problem(version) == site.problem("v1") == ""
    note = f"{len(reader.seen)} reads, all 200"
    outcome(3, f"`kill -9` in publishing, at {step}", recovery=recovery, note=note)


@pytest.mark.long
def test_blobs_of_a_failed_publication_are_collected(site: Site, outcome: Callable[..., None]) -> None:
    """What no version came to name is collected; what is served stays."""
    publish_first(site)
    site.ready_edit("owl")
    version = site.apply(edits="ready", alias="production")
    before = {blob.sha256 for blob in site.store.list_blobs()}
    doomed = site.start_worker(["tests.faults.dying_worker", "rows"], EMENDER_MAX_ATTEMPTS="1")
    until(lambda: doomed.status is not None, timeout=240)
    orphans = {blob.sha256 for blob in site.store.list_blobs()} - before
    assert len(orphans) == 5, "weights, adapter, card, manifest and signature"
    site.start_worker(EMENDER_MAX_ATTEMPTS="1")
    made = site.await_version(version)
    assert (made["state"], made["problem"]["title"], site.alias()) == ("failed", "Worker lost", "v1")
    assert collect(site)["blobs"] == len(orphans)
    assert {blob.sha256 for blob in site.store.list_blobs()} == before
    assert site.problem("v1") == ""
    outcome(3, "a publication killed in each attempt", note=f"failed, alias unmoved; {len(orphans)} orphans collected")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, in a mount namespace of its own, which ends with its keeper."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    folder = tmp_path / "disk"
    folder.mkdir()
    script = f"mount -t tmpfs -o size=2m,mode=0755 tmpfs '{folder}' && echo mounted && exec sleep 3600"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=die_with_parent()) as keeper:
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"mounted\n":
            pytest.skip("needs to be allowed to mount a tmpfs in a user namespace")
        yield Path(f"/proc/{keeper.pid}/root{folder}")
        keeper.kill()


def test_a_full_disk_fails_the_publication(
    clean_database: Engine,
    database_url: str,
    base_folder: Path,
    tmp_path: Path,
    tiny_disk: Path,
    outcome: Callable[..., None],
) -> None:
    site = Site(database_url, tmp_path / "site", base_folder, store=tiny_disk / "store")
    try:
        site.api.start()
        publish_first(site)
        ballast = tiny_disk / "ballast"
        free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
        ballast.write_bytes(bytes(free - 40_000))
        assert post_picture(site, tmp_path).status_code == 507

        site.ready_edit("owl")
        version = site.apply(edits="ready", alias="production")
        site.start_worker()
        made = site.await_version(version)
        assert (made["state"], made["problem"]["title"], made["files"]) == ("failed", "Storage failed", [])
        assert "No space left on device" in made["problem"]["detail"]
        assert site.alias() == "v1" and site.problem("v1") == ""
        assert not list(site.store.folder.glob("incoming-*"))

        ballast.unlink()
        made = site.await_version(site.apply(edits="ready", alias="production"))
        assert (made["state"], site.alias()) == ("published", made["version"])
        assert post_picture(site, tmp_path).status_code == 201
        note = "507, version failed, no partial file, alias unmoved; with space, both succeed"
        outcome(7, "a full disk (tmpfs) at upload and publish", note=note)
    finally:
        site.close()


def test_a_file_size_limit_fails_the_publication(site: Site, tmp_path: Path, outcome: Callable[..., None]) -> None:
    """RLIMIT_FSIZE of the API's process: the same to it as a full disk."""
    resource.prlimit(site.api.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    before = {blob.sha256 for blob in site.store.list_blobs()}
    refused = post_picture(site, tmp_path)
    assert (refused.status_code, refused.headers["Content-Type"]) == (507, "application/problem+json")
    assert {blob.sha256 for blob in site.store.list_blobs()} == before
    assert not list(site.store.folder.glob("incoming-*"))
    resource.prlimit(site.api.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert post_picture(site, tmp_path).status_code == 201
    outcome(7, "RLIMIT_FSIZE at upload", note="507, nothing left; the limit lifted, 201")


def post_picture(site: Site, folder: Path) -> httpx.Response:
    """About 190 kB that no PNG makes smaller."""
    path = folder / "noise.png"
    Image.frombytes("RGB", (250, 250), os.urandom(250 * 250 * 3)).save(path)
    return site.ask("POST", "/v1/images", files={"file": ("noise.png", path.read_bytes(), "image/png")})
