"""The worker process: `python -m app.worker.main`. Runs jobs, and maintains the queue for all workers."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import structlog
from prometheus_client import start_http_server
from sqlalchemy.exc import DBAPIError

from app.api.idempotency import delete_expired
from app.audit.events import subscribe
from app.db.engine import Sessions, connect, sessions
from app.jobs import workers
from app.jobs.notifier import JobNotifier, NotifierUnavailable, PollingNotifier, notify_after_commit
from app.jobs.redis_notifier import open_notifier
from app.jobs.sweeper import renotify_stale_jobs, requeue_expired_jobs
from app.observability import logging
from app.observability.metrics import NOTIFIER_ERRORS, WORKER
from app.observability.outages import Outage
from app.settings import Settings, get_settings
from app.signing.keys import UNSIGNED, SigningKeyUnusable, read_configured_key
from app.storage import open_store
from app.webhooks.queries import delete_old_deliveries
from app.webhooks.subscriptions import EVENTS, enqueue_deliveries
from app.worker.claims import claim_delivery
from app.worker.runner import Runner

log = structlog.get_logger()

DELIVERY_THREADS = 2  # a slow receiver occupies one of them


def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. The current work then ends at its next step and goes back to the queue."""
    if settings.database_url is None:
        raise ValueError("EMENDER_DATABASE_URL is not set; set it, or use `emender serve --embedded`")
    signer = read_configured_key(settings.signing_key_file)  # first: a worker that cannot sign must not start
    if signer is None:
        log.warning("checkpoints are published without a signature", EMENDER_SIGNING_KEY_FILE=UNSIGNED)
    stopping = threading.Event()
    name = f"{socket.gethostname()}-{os.getpid()}"
    engine = connect(settings.database_url.get_secret_value(), idle_seconds=settings.lease_seconds)
    factory = sessions(engine)
    notifier = open_notifier(settings)
    notify_after_commit(factory, notifier)
    subscribe(enqueue_deliveries, actions=EVENTS)
    start_runner = partial(
        Runner, settings=settings, sessions=factory, store=open_store(settings), worker=name, stopping=stopping
    )
    runner = start_runner()
    maintenance = thread(run_maintenance, runner, notifier=open_notifier(settings), stopping=stopping)
    if settings.webhook_secret_key is None:
        log.info("webhooks are left to workers with EMENDER_WEBHOOK_SECRET_KEY")
    else:  # in threads of their own, so that a slow receiver delays no other job
        for number in range(DELIVERY_THREADS):
            deliverer = start_runner(claim=claim_delivery)
            thread(send_deliveries, deliverer, name=f"deliveries-{number}", stopping=stopping)
    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, settings.host, WORKER)
    device = runner.context.pipelines.prepare()
    for number in (signal.SIGTERM, signal.SIGINT):  # before the first claim, a signal may end the process at once
        signal.signal(number, lambda *_: stopping.set())
    log.info(
        "worker started",
        worker=name,
        device=device,
        signing_key=signer and signer.id,
        notifier="redis" if settings.redis_url else "polling",
    )
    notifier.listen(runner.work, stopping=stopping)
    maintenance.join(timeout=10)
    sign_off(factory, name=name)
    engine.dispose()
    log.info("worker stopped", worker=name)


def send_deliveries(runner: Runner, *, stopping: threading.Event) -> None:
    """Send webhooks until `stopping` is set. The process does not wait for a delivery that is being sent: it is sent
    again by another worker."""
    polling = PollingNotifier(seconds=runner.settings.poll_interval_seconds)
    while not stopping.is_set():
        try:
            polling.listen(runner.work, stopping=stopping)
        except Exception:
            log.exception("sending webhooks failed; it continues")
            stopping.wait(polling.seconds)


def thread(target: Callable[..., None], *arguments: object, name: str = "", **options: object) -> threading.Thread:
    """Start a daemon thread."""
    started = threading.Thread(target=target, args=arguments, kwargs=options, name=name or target.__name__, daemon=True)
    started.start()
    return started


def sign_off(factory: Sessions, *, name: str) -> None:
    """Delete the worker's row, so that it does not look alive for another 30 seconds."""
    try:
        with factory() as session:
            workers.sign_off(session, name=name)
            session.commit()
    except DBAPIError as error:
        log.warning("not signed off: the database does not answer", error=type(error).__name__)


def run_maintenance(runner: Runner, *, notifier: JobNotifier, stopping: threading.Event) -> None:
    """Sign on, requeue expired jobs, renotify stale ones, and delete old idempotency keys and deliveries.

    Every worker does this each `poll_seconds`, in a thread: the loss of any process delays it and loses nothing.
    """
    database, redis = Outage("the database does not answer"), Outage("stale jobs not notified")
    signed_on_at = -workers.SEEN_SECONDS
    while not stopping.wait(runner.settings.poll_interval_seconds):
        try:
            runner.heartbeat.beat()  # first: after a suspend, this worker must not requeue its own jobs
            with runner.sessions() as session:
                if time.monotonic() - signed_on_at >= workers.SEEN_SECONDS:
                    workers.sign_on(session, name=runner.worker)
                    signed_on_at = time.monotonic()
                requeue_expired_jobs(session, max_attempts=runner.settings.max_attempts)
                session.commit()
            database.end()
            with runner.sessions() as session:
                delete_expired(session)
                delete_old_deliveries(session)
                session.commit()
                renotify_stale_jobs(session, notifier=notifier)
            redis.end()
        except NotifierUnavailable as error:
            NOTIFIER_ERRORS.inc()
            redis.begin(reason=str(error))
        except DBAPIError as error:
            database.begin(error=type(error).__name__)
        except Exception:
            log.exception("maintenance failed; it continues")


def main() -> None:
    logging.configure()
    try:
        run(get_settings())
    except SigningKeyUnusable as error:
        sys.exit(error.detail)


if __name__ == "__main__":
    main()
