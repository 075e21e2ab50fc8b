"""The worker process: `python -m app.worker.main`. Claims jobs, and keeps the queue in order for all workers."""

import os
import signal
import socket
import sys
import threading
import time

import structlog
from prometheus_client import start_http_server
from sqlalchemy.exc import DBAPIError

from app.api.idempotency import forget
from app.db.engine import Sessions, connect, sessions
from app.jobs import workers
from app.jobs.dispatcher import dispatch
from app.jobs.notifier import Bell, BellBroken
from app.jobs.polling_notifier import PollingBell
from app.jobs.redis_notifier import RedisBell
from app.jobs.sweeper import requeue_expired, ring_again
from app.observability import logging
from app.observability.metrics import WORKER
from app.settings import Settings, get_settings
from app.signing.keys import UNSIGNED, SigningKeyUnusable, key_of
from app.storage import open_store
from app.webhooks.queries import forget as forget_deliveries
from app.webhooks.sender import open_sender
from app.worker.runner import Runner, fail

log = structlog.get_logger()

SENDERS = 2  # a receiver that answers slowly holds up one of them


def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT: then the work under way ends at its next step and goes back to the queue."""
    if settings.database_url is None:
        raise ValueError("EMENDER_DATABASE_URL is not set; set it, or use `emender serve --embedded`")
    signer = key_of(settings.signing_key_file)  # before anything else: a worker that cannot sign shall not start
    if signer is None:
        log.warning("versions are published without a signature", EMENDER_SIGNING_KEY_FILE=UNSIGNED)
    stopping = threading.Event()
    name = f"{socket.gethostname()}-{os.getpid()}"
    engine = connect(settings.database_url.get_secret_value(), idle_seconds=settings.lease_seconds)
    factory = sessions(engine)
    bell = open_bell(settings, worker=name)
    store = open_store(settings)
    runner = Runner(settings=settings, sessions=factory, store=store, worker=name, stopping=stopping)
    housekeeping = threading.Thread(
        target=keep_house,
        kwargs={"runner": runner, "bell": open_bell(settings), "stopping": stopping},
        name="housekeeping",
        daemon=True,
    )
    housekeeping.start()
    start_senders(settings, factory, stopping=stopping)
    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, settings.host, WORKER)
    device = runner.context.pipelines.prepare()
    for number in (signal.SIGTERM, signal.SIGINT):  # until here nothing is held, and a signal may end us at once
        signal.signal(number, lambda *_: stopping.set())
    log.info(
        "worker started",
        worker=name,
        device=device,
        signing_key=signer and signer.id,
        bell="redis" if settings.redis_url else "polling",
    )
    bell.listen(lambda _: runner.work(), stopping=stopping)  # not the job that was announced: jobs take turns
    housekeeping.join(timeout=10)
    sign_off(factory, name=name)
    engine.dispose()
    log.info("worker stopped", worker=name)


def open_bell(settings: Settings, *, worker: str = "") -> Bell:
    """The bell of the settings: Redis where there is one, else polling."""
    if settings.redis_url is None:
        return PollingBell(seconds=settings.poll_interval_seconds)
    return RedisBell(settings.redis_url.get_secret_value(), poll_seconds=settings.poll_interval_seconds, worker=worker)


def start_senders(settings: Settings, factory: Sessions, *, stopping: threading.Event) -> None:
    """Send webhooks in threads of their own: they wait for receivers, and shall not hold up the jobs.

    None is waited for at the end. What a worker was sending when it ended, another sends again.
    """
    sender = open_sender(settings, factory)
    if sender is None:
        log.info("webhooks are left to workers that have EMENDER_WEBHOOK_SECRET_KEY")
        return
    given = {"stopping": stopping, "poll_seconds": settings.poll_interval_seconds}
    for number in range(SENDERS):
        threading.Thread(target=sender.run, kwargs=given, name=f"webhooks-{number}", daemon=True).start()


def sign_off(factory: Sessions, *, name: str) -> None:
    """So that nobody waits to see that this worker has ended."""
    try:
        with factory() as session:
            workers.left(session, name=name)
            session.commit()
    except DBAPIError as error:
        log.warning("not signed off: the database does not answer", error=type(error).__name__)


def keep_house(*, runner: Runner, bell: Bell, stopping: threading.Event) -> None:
    """Say that the worker is alive, dispatch the outbox, requeue what lost its worker, announce what was not heard,
    forget old answers and deliveries.

    Every worker does this in a thread, every `poll_interval_seconds`. Losing a process delays it and loses nothing.
    """
    broken = away = False  # said once, not at every round
    seen_at = -workers.SEEN_SECONDS
    while not stopping.wait(runner.settings.poll_interval_seconds):
        try:
            runner.heartbeat.beat()  # a machine that slept, or starved, shall not take its own work for lost
            with runner.sessions() as session:
                if time.monotonic() - seen_at >= workers.SEEN_SECONDS:
                    workers.seen(session, name=runner.worker)
                    seen_at = time.monotonic()
                requeue_expired(session, max_attempts=runner.settings.max_attempts, fail=fail)
                session.commit()
            away = False
            with runner.sessions() as session:
                dispatch(session, bell=bell)
                session.commit()
            with runner.sessions() as session:
                ring_again(session, bell=bell)
                forget(session)
                forget_deliveries(session)
                session.commit()
            broken = False
        except BellBroken as error:
            if not broken:
                log.warning("not announced yet", reason=str(error))
            broken = True
        except DBAPIError as error:
            if not away:
                log.warning("the database does not answer", error=type(error).__name__)
            away = True
        except Exception:
            log.exception("housekeeping failed; it goes on")


def main() -> None:
    logging.configure()
    try:
        run(get_settings())
    except SigningKeyUnusable as error:
        sys.exit(error.detail)


if __name__ == "__main__":
    main()
