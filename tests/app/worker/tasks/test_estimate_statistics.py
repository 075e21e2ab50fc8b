import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

import editing
from app.db.engine import Sessions
from app.db.models import AuditEvent, Job, Model, Statistics
from app.jobs.enqueue import enqueue
from app.jobs.kinds import ESTIMATE_STATISTICS
from app.settings import Settings
from app.storage.local import LocalStore
from app.worker.runner import Runner
from emender.schemas.common import Progress

CAPTIONS = [f"a picture of thing number {n}" for n in range(100)]


@pytest.fixture
def ask(registered: Model, factory: Sessions, store: LocalStore) -> Callable[..., UUID]:
    """Queue statistics over the captions; returns their id."""

    def add(**columns: object) -> UUID:
        packed = "".join(caption + "\n" for caption in CAPTIONS).encode()
        given = {"captions_name": "test", "captions_sha256": store.put(packed), "captions": 100, "created_by": "test"}
        with factory() as session:
            row = Statistics(model_id=registered.id, **(given | columns))
            session.add(row)
            session.flush()
            enqueue(session, kind=ESTIMATE_STATISTICS, target_id=row.id, actor="test")
            session.commit()
            return row.id

    return add


@pytest.fixture
def read(factory: Sessions) -> Callable[[UUID], Statistics]:
    def read(statistics_id: UUID) -> Statistics:
        with factory() as session:
            return session.get_one(Statistics, statistics_id)

    return read


def test_the_moments_equal_those_of_the_library(
    ask: Callable[..., UUID],
    read: Callable[[UUID], Statistics],
    runner: Runner,
    registered: Model,
    store: LocalStore,
    factory: Sessions,
) -> None:
    row_id = ask()
    assert runner.work()
    row = read(row_id)
    expected = editing.estimate_second_moments(runner.context.pipelines.get(registered.id).encoder, CAPTIONS)
    assert (row.state, row.digest, row.problem) == ("ready", expected.digest, None)
    assert (row.captions, row.tokens, row.truncated) == (100, expected.tokens, expected.truncated)
    assert row.digest is not None and store.read(row.digest) == expected.to_bytes()
    with factory() as session:
        event = session.get_one(AuditEvent, 2)
    assert (event.action, event.target) == ("statistics.ready", "model:tiny")


def test_missing_captions_fail_the_job(
    ask: Callable[..., UUID], read: Callable[[UUID], Statistics], runner: Runner
) -> None:
    row_id = ask(captions_sha256="0" * 64)
    runner.work()
    row = read(row_id)
    assert row.state == "failed" and row.problem is not None and row.problem["title"] == "Damaged store"


def test_a_stop_between_batches_requeues_the_job(
    ask: Callable[..., UUID],
    read: Callable[[UUID], Statistics],
    runner: Runner,
    stopping: threading.Event,
    factory: Sessions,
) -> None:
    row_id = ask()
    stopping.set()
    runner.work()
    assert read(row_id).state == "queued" and read(row_id).digest is None
    with factory() as session:
        assert session.query(Job).filter_by(target_id=row_id).one().attempt == 0
    stopping.clear()
    runner.work()
    assert read(row_id).state == "ready"


@pytest.fixture
def estimates(settings: Settings) -> Path:
    """The folder with the sums of running estimates."""
    return settings.data_dir / "estimates"


def test_an_interrupted_estimate_resumes(
    ask: Callable[..., UUID],
    read: Callable[[UUID], Statistics],
    runner: Runner,
    registered: Model,
    stopping: threading.Event,
    estimates: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after the first of two batches, it goes on with the second alone, and its bytes are the same."""
    row_id = ask()
    stopping.set()
    runner.work()
    assert [path.name for path in (estimates / str(row_id)).iterdir()] == ["text_encoder.safetensors"]
    stopping.clear()
    seen: list[Progress] = []
    monkeypatch.setattr(runner.heartbeat, "report", lambda _, progress: seen.append(progress))
    runner.work()
    assert [progress.done for progress in seen] == [64, 100]
    expected = editing.estimate_second_moments(runner.context.pipelines.get(registered.id).encoder, CAPTIONS)
    assert read(row_id).digest == expected.digest
    assert list(estimates.iterdir()) == []


def test_sums_of_another_estimate_are_ignored(
    ask: Callable[..., UUID], read: Callable[[UUID], Statistics], runner: Runner, registered: Model, estimates: Path
) -> None:
    row_id = ask()
    (estimates / str(row_id)).mkdir(parents=True)
    (estimates / str(row_id) / "text_encoder.safetensors").write_bytes(b"torn")
    runner.work()
    expected = editing.estimate_second_moments(runner.context.pipelines.get(registered.id).encoder, CAPTIONS)
    assert (read(row_id).state, read(row_id).digest) == ("ready", expected.digest)


def test_files_of_failed_estimates_are_removed(
    ask: Callable[..., UUID], runner: Runner, stopping: threading.Event, estimates: Path, factory: Sessions
) -> None:
    given_up, waiting, ours = ask(), ask(), ask()
    with factory() as session:
        for row_id in (given_up, waiting):  # of the two, one will be tried again
            session.query(Job).filter_by(target_id=row_id).one().state = "failed"
        session.get_one(Statistics, given_up).state = "failed"
        session.commit()
    for row_id in (given_up, waiting):
        (estimates / str(row_id)).mkdir(parents=True)
        (estimates / str(row_id) / ".text_encoder.safetensors.7").write_bytes(b"cut")
    stopping.set()
    runner.work()
    assert {path.name for path in estimates.iterdir()} == {str(waiting), str(ours)}
