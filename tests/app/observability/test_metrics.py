"""Scrape the metrics after real work and parse them as Prometheus does."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

import editing
from app.api.rate_limit import RateLimits
from app.db.engine import sessions
from app.db.models import Edit, Job, Webhook, Worker
from app.jobs import leases, workers
from app.jobs.enqueue import enqueue_many
from app.jobs.kinds import DELIVER_WEBHOOK, OPTIMIZE_EDIT, REGISTER_MODEL
from app.jobs.sweeper import requeue_expired_jobs
from app.main import create_app
from app.observability.database_metrics import DatabaseMetrics
from app.observability.metrics import WORKER
from app.settings import Settings
from tests.app.checkpoints.conftest import Service

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
QUICK = {"objective": "text", "optimization_steps": 3}


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def scrape(client: TestClient) -> Samples:
    """Return the current metrics: the database is read again."""
    client.app.state.database_metrics.cached.seconds = 0  # type: ignore[attr-defined]
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    return parse(answer.text)


def worker_samples() -> Samples:
    return parse(generate_latest(WORKER).decode())


def test_an_edit_is_counted_from_request_to_pull(service: Service) -> None:
    before, worker_before = scrape(service.client), worker_samples()
    body = {"source": "a secret fox", "destination": {"prompt": "dog"}, "templates": ["a {}"], "settings": QUICK}
    url = f"/v1/models/{service.model.name}/edits"
    assert service.client.post(url, json=body, headers=service.keys["edit"]).status_code == 202
    queued = scrape(service.client)
    assert value(queued, "emender_jobs", kind="optimize_edit", state="queued") == 1
    assert 0 <= value(queued, "emender_oldest_queued_job_seconds", kind="optimize_edit") < 600
    made = service.apply(edits=[str(service.edit("fox"))])
    pulled = service.client.get(
        f"/emender/{service.model.name}/resolve/{made['version']}/README.md", headers=service.keys["read"]
    )
    again = service.client.get(
        f"/emender/{service.model.name}/resolve/{made['version']}/README.md",
        headers=service.keys["read"] | {"If-None-Match": pulled.headers["ETag"]},
    )
    assert (pulled.status_code, again.status_code) == (200, 304)

    text = service.client.get("/metrics").text
    for secret in ("fox", service.model.name, service.keys["read"]["Authorization"][-20:], "README", made["commit"]):
        assert secret not in text
    after, worker_after = scrape(service.client), worker_samples()

    def increase(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert value(after, "emender_database_up") == 1
    assert value(after, "emender_jobs", kind="optimize_edit", state="queued") == 0
    for kind in ("optimize_edit", "build_checkpoint"):
        assert value(after, "emender_jobs_ended_recently", kind=kind, state="succeeded") == 1
    route = "/{namespace}/{repo}/resolve/{revision}/{path:path}"
    for status in ("200", "304"):
        assert increase("emender_http_requests_total", method="GET", route=route, status=status) == 1
    posted = {"method": "POST", "route": "/v1/models/{model}/edits"}
    assert increase("emender_http_requests_total", **posted, status="202") == 1
    assert increase("emender_http_request_seconds_count", **posted) == 1
    assert increase("emender_pulls_total", how="sent") == increase("emender_pulls_total", how="unchanged") == 1
    assert increase("emender_pulled_bytes_total") == len(pulled.content)
    assert value(after, "emender_info", version=editing.__version__) == 1

    def worker_increase(name: str, **labels: str) -> float:
        return value(worker_after, name, **labels) - value(worker_before, name, **labels)

    assert worker_increase("emender_job_seconds_count", kind="optimize_edit", outcome="succeeded") == 1
    assert worker_increase("emender_job_seconds_count", kind="build_checkpoint", outcome="succeeded") == 1
    for stage in ("stage_one", "loading", "stage_two", "publishing"):
        assert worker_increase("emender_stage_seconds_count", stage=stage) == 1, stage
    assert worker_increase("emender_stage_one_loss_count", loss="text") == 1
    assert worker_increase("emender_residual_count", method="text_encoder") == 1
    with service.sessions() as session:
        edit = session.scalars(select(Edit).where(Edit.source == "a secret fox")).one()
        assert edit.value is not None
        losses = edit.value.losses
    assert worker_increase("emender_stage_one_loss_sum", loss="text") == pytest.approx(losses["text"][-1])
    (edit,) = made["edits"]
    assert worker_increase("emender_residual_sum", method="text_encoder") == pytest.approx(edit["relative_residual"])


def test_database_metrics_match_the_rows(clean_database: Engine, tmp_path: Path) -> None:
    metrics = DatabaseMetrics(sessions(clean_database), folder=tmp_path / "none" / "yet", seconds=0)
    hour = timedelta(hours=1)
    with Session(clean_database) as session:
        jobs = enqueue_many(session, kind=OPTIMIZE_EDIT, actor="test", target_ids=[uuid7() for _ in range(4)])
        waiting, running, failed, old = [session.get_one(Job, job_id) for job_id in jobs]
        waiting.attempt = 2
        waiting.due_at = session.scalars(select(func.now() - hour)).one()
        running.state, running.attempt = "running", 2
        failed.state, failed.attempt, failed.finished_at = "failed", 5, session.scalar(select(func.now()))
        old.state, old.attempt, old.finished_at = "failed", 5, session.scalar(select(func.now() - hour))
        for name, ago in {"here": 0, "gone": 60, "long gone": 2 * 24 * 3600}.items():
            at = session.scalar(select(func.now() - timedelta(seconds=ago)))
            session.add(Worker(name=name, version="0.0.1", seen_at=at))
        workers.sign_on(session, name="new")
        hook = Webhook(url="https://secret.example/", events=[], key_id="k", secret_salt=b"", created_by="test")
        hook.failing_since = session.scalar(select(func.now()))
        off = Webhook(
            url="https://off.example/", events=[], key_id="k", secret_salt=b"", created_by="test", enabled=False
        )
        session.add_all([hook, off])
        session.flush()
        (delivery_id,) = enqueue_many(session, kind=DELIVER_WEBHOOK, target_ids=[uuid7()], actor="webhook:1")
        pending = session.get_one(Job, delivery_id)
        pending.attempt, pending.due_at = 3, session.scalars(select(func.now() - hour)).one()
        session.commit()
    samples = parse(metrics.text().decode())
    assert value(samples, "emender_jobs", kind="optimize_edit", state="queued") == 1
    assert value(samples, "emender_jobs", kind="optimize_edit", state="running") == 1
    assert 3600 <= value(samples, "emender_oldest_queued_job_seconds", kind="optimize_edit") < 7200
    assert value(samples, "emender_oldest_queued_job_seconds", kind="build_checkpoint") == 0
    assert value(samples, "emender_jobs_ended_recently", kind="optimize_edit", state="failed") == 1
    assert value(samples, "emender_jobs_leases_lost", kind="optimize_edit") == 2 + 1 + 4
    assert value(samples, "emender_workers", version="0.0.1") == 1
    assert value(samples, "emender_workers", version=editing.__version__) == 1
    assert (
        value(samples, "emender_webhooks", state="failing") == value(samples, "emender_webhooks", state="disabled") == 1
    )
    assert value(samples, "emender_webhooks", state="working") == 0
    assert 3600 <= value(samples, "emender_oldest_queued_job_seconds", kind="deliver_webhook") < 7200
    assert value(samples, "emender_jobs_leases_lost", kind="deliver_webhook") == 0, "retries are not lost leases"
    assert 0 < value(samples, "emender_store_free_bytes") <= value(samples, "emender_store_size_bytes")
    with Session(clean_database) as session:
        assert session.scalars(select(Worker.name).order_by(Worker.name)).all() == ["gone", "here", "new"]


def test_unavailable_database_leaves_only_up_and_disk_metrics(tmp_path: Path) -> None:
    nowhere = Settings(database_url=SecretStr("postgresql://127.0.0.1:1/nowhere"), data_dir=tmp_path)
    with TestClient(create_app(nowhere)) as client:
        samples = scrape(client)
        assert value(samples, "emender_database_up") == 0
        assert ("emender_database_up", frozenset()) in samples
        assert not {name for name, _ in samples} & {"emender_jobs", "emender_workers"}
        assert value(samples, "emender_store_free_bytes") > 0


def test_database_is_read_once_in_the_cache_time(clean_database: Engine, tmp_path: Path) -> None:
    metrics = DatabaseMetrics(sessions(clean_database), folder=tmp_path, seconds=3600)
    first = metrics.text()
    with Session(clean_database) as session:
        enqueue_many(session, kind=OPTIMIZE_EDIT, actor="test", target_ids=[uuid7()])
        session.commit()
    assert metrics.text() == first


def test_a_slow_read_does_not_block_other_requests(clean_database: Engine, tmp_path: Path) -> None:
    metrics = DatabaseMetrics(sessions(clean_database), folder=tmp_path, seconds=0)
    first = metrics.text()
    with metrics.cached._lock:
        assert metrics.text() == first


def test_a_locked_table_counts_as_unavailable_after_a_timeout(clean_database: Engine, tmp_path: Path) -> None:
    metrics = DatabaseMetrics(sessions(clean_database), folder=tmp_path, seconds=0)
    with clean_database.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        assert value(parse(metrics.text().decode()), "emender_database_up") == 0


class TestRequests:
    @pytest.mark.parametrize(
        ("method", "path", "template"),
        [
            ("GET", "/healthz", "/healthz"),
            ("GET", "/nothing/here", "unmatched"),
            ("GET", "/v1/edits/of-nobody", "/v1/edits/{edit_id}"),
            ("GET", "/admin/static/style.css", "/admin"),
            ("PATCH", "/v1/models", "/v1/models"),
        ],
    )
    def test_requests_are_counted_by_route_template(
        self, client: TestClient, method: str, path: str, template: str
    ) -> None:
        before = scrape(client)
        status = str(client.request(method, path).status_code)
        labels = {"method": method, "route": template, "status": status}
        after = scrape(client)
        name = "emender_http_requests_total"
        assert value(after, name, **labels) - value(before, name, **labels) == 1

    def test_unknown_methods_are_not_labels(self, client: TestClient) -> None:
        client.request("BREW", "/healthz")
        samples = scrape(client)
        assert value(samples, "emender_http_requests_total", method="other", route="/healthz", status="405") >= 1
        assert "BREW" not in str(samples.keys())

    def test_requests_over_the_limit_are_counted(
        self, client: TestClient, application: FastAPI, settings: Settings
    ) -> None:
        limited = settings.model_copy(update={"rate_limit": "1/minute"})
        application.state.rate_limits = RateLimits(limited)
        before = scrape(client)
        assert [client.get("/v1/models").status_code for _ in range(3)] == [401, 429, 429]
        after = scrape(client)
        name = "emender_requests_refused_total"
        assert value(after, name, limit="requests") - value(before, name, limit="requests") == 2


COUNT_AND_SCRAPE = """
import sys
from prometheus_client import generate_latest
from app.observability.metrics import PULLED_BYTES
from app.observability.routes import _api_registry
PULLED_BYTES.inc(int(sys.argv[1]))
print(generate_latest(_api_registry()).decode())
"""


def test_metrics_of_several_api_processes_are_added_up(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    pages = [
        subprocess.run(
            [sys.executable, "-c", COUNT_AND_SCRAPE, count], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for count in ("3", "4")
    ]
    assert [value(parse(page), "emender_pulled_bytes_total") for page in pages] == [3, 7]


def test_expired_leases_are_counted(clean_database: Engine) -> None:
    before = worker_samples()
    with Session(clean_database) as session:
        enqueue_many(session, kind=REGISTER_MODEL, actor="test", target_ids=[uuid7()])
        leases.claim(session, worker="w", lease_seconds=-1, candidates=select(Job.id))
        session.commit()
        assert requeue_expired_jobs(session, max_attempts=5) == 1
        session.commit()
    labels = {"kind": "register_model", "outcome": "requeued"}
    name = "emender_leases_expired_total"
    assert value(worker_samples(), name, **labels) - value(before, name, **labels) == 1
