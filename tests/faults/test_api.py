"""Parallel requests, and an API that is killed: each accepted request is done once."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import httpx
import httpx2
import pytest
from sqlalchemy import func, select

from app.db.models import AuditEvent, Edit, IdempotencyKey, Job
from emender import Client
from tests.faults.conftest import Site, until
from tests.servers import RedisServer

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]


class Wire(httpx2.HTTPTransport):
    """Counts how often each request is sent."""

    def __init__(self, tries: Counter[str]) -> None:
        super().__init__(trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0))
        self.tries = tries

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.tries[request.headers["Idempotency-Key"]] += 1
        return super().handle_request(request)


KEY = {"Idempotency-Key": "once"}


def made(site: Site) -> tuple[int, ...]:
    """How many edits there are, jobs, kept answers, and events of edits that were made."""
    with site.sessions() as session:
        tables = [session.scalar(select(func.count()).select_from(table)) or 0 for table in (Edit, Job, IdempotencyKey)]
        events = select(func.count()).where(AuditEvent.action == "edit.create")
        return *tables, session.scalar(events) or 0


def test_fifty_posts_with_one_idempotency_key_create_one_edit(site: Site, outcome: Callable[..., None]) -> None:
    def post(_: int) -> httpx.Response:
        while (answer := site.post_edit("cat", headers=KEY)).status_code == 409:  # the first is still at work
            time.sleep(float(answer.headers["Retry-After"]))
        return answer

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(post, range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert len([answer for answer in answers if "Idempotency-Replayed" not in answer.headers]) == 1
    assert made(site) == (1, 1, 1, 1)
    other = site.post_edit("old cat", headers=KEY)
    assert other.status_code == 422 and other.json()["errors"][0]["pointer"] == "Idempotency-Key"
    assert made(site) == (1, 1, 1, 1)
    outcome(8, "50 parallel POSTs with one Idempotency-Key", note="one edit, 50 equal bodies; a changed body 422")


def test_retried_posts_create_each_edit_once_when_the_api_is_killed(site: Site, outcome: Callable[..., None]) -> None:
    """Each client sends its POST again, under its key, until it is answered: each edit is there once."""
    token = site.keys["edit"]["Authorization"].removeprefix("Bearer ")
    tries: Counter[str] = Counter()
    with (
        ThreadPoolExecutor(16) as pool,
        Client(site.api.url, api_key=token, retries=12, transport=Wire(tries)) as client,
    ):

        def post(number: int) -> str:
            return str(client.edits.create("tiny", source=f"cat {number}", destination="dog", templates=["a {}"]).id)

        posts = [pool.submit(post, number) for number in range(60)]
        recovery = 0.0
        for _ in range(2):
            done = sum(future.done() for future in posts)
            until(lambda done=done: sum(future.done() for future in posts) > done + 10, timeout=60)  # type: ignore[misc]
            site.api.kill()
            killed = time.monotonic()
            site.api.start()
            recovery = max(recovery, time.monotonic() - killed)
        ids = [future.result() for future in posts]
    assert max(tries.values()) > 1, "the kills met no request"
    assert len(set(ids)) == 60
    assert made(site) == (60, 60, 60, 60)
    outcome(4, "`kill -9` of the API under POSTs, twice", recovery=recovery, note="60 keys, 60 edits")


def test_a_lost_notification_is_sent_by_the_sweeper(
    redis_server: RedisServer, site: Site, outcome: Callable[..., None]
) -> None:
    """The API knows no Redis, so nothing is sent after the commit; a worker's sweeper sends the notification."""
    worker = site.start_worker(EMENDER_REDIS_URL=redis_server.url)
    worker.await_start()
    answer = site.post_edit("cat")
    site.api.kill()
    killed = time.monotonic()
    assert answer.status_code == 202
    edit_id = UUID(answer.json()["id"])
    job_id = site.job_table.latest_job(edit_id)
    until(lambda: site.job_table.job(job_id).attempt == 1, timeout=30)
    recovery = time.monotonic() - killed
    site.job_table.await_state(job_id, "succeeded")
    outcome(4, "`kill -9` of the API after its answer", recovery=recovery, **site.job_table.tally([edit_id]))


def test_concurrent_applies_publish_each_checkpoint_once(site: Site, outcome: Callable[..., None]) -> None:
    """Of the same edits and of others, to one alias, built by two workers."""
    fox, owl = site.ready_edit("fox"), site.ready_edit("owl")
    with ThreadPoolExecutor(4) as pool:
        asked = [{"edits": ids, "alias": "production"} for ids in ([fox], [fox], [fox, owl], [owl])]
        versions = list(pool.map(lambda body: site.apply(**body), asked))
    assert sorted(versions) == ["v1", "v2", "v3", "v4"]
    workers = [site.start_worker(), site.start_worker()]
    built = [site.await_version(version) for version in versions]
    assert {version["state"] for version in built} == {"published"}
    files = [{file["path"]: file["sha256"] for file in version["files"]} for version in built]
    for each in files:
        each.pop("model.sig")  # ECDSA draws a random number for each signature
    assert files[0] == files[1] and built[0]["commit"] == built[1]["commit"]
    assert len({version["commit"] for version in built}) == 3
    moved = [version["version"] for version in built if version["alias"]["moved"]]
    assert moved == [site.alias()], "all were asked for when there was no alias; the first to be published made it"
    names = {site.job_table.build_job(version).worker for version in versions}
    note = f"v1 to v4 by {len(names)} workers; equal sets, equal bytes; the alias moved once"
    outcome(9, "four applies at once", note=note)

    tag = site.ask("GET", "/v1/models/tiny/aliases/production").headers["ETag"]
    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(lambda _: site.move_alias("v4", etag=tag).status_code, range(8)))
    assert statuses == [200] + [412] * 7
    outcome(9, "eight moves of one alias at once", note="one 200, seven 412")
    for worker in workers:
        worker.stop()
