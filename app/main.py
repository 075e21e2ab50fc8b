"""The HTTP application. `uvicorn app.main:application --factory` serves it; nothing here imports torch."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

import editing
from app.admin import application as pages
from app.api.documentation import router as documentation
from app.api.middleware.requests import RequestMiddleware
from app.api.openapi import describe
from app.api.problems import install_handlers
from app.api.rate_limit import RateLimits
from app.api.waiting import StatusWatcher
from app.audit.events import subscribe
from app.audit.routes import router as audit
from app.auth.routes import router as keys
from app.checkpoints.routes import router as checkpoints
from app.db.engine import connect, sessions
from app.edits.routes import router as edits
from app.evaluations.routes import router as evaluations
from app.hub.routes import router as hub
from app.images.routes import router as images
from app.jobs.notifier import notify_after_commit
from app.models.routes import router as models
from app.observability import logging
from app.observability.database_metrics import DatabaseMetrics
from app.observability.health import Health
from app.observability.routes import router as watching
from app.problems import Forbidden, TooManyRequests, Unauthorized, Unavailable, Unprocessable, documented
from app.settings import Settings, get_settings
from app.signing.routes import router as signing_keys
from app.storage import open_store
from app.webhooks.openapi import describe_events
from app.webhooks.routes import router as webhooks
from app.webhooks.subscriptions import EVENTS, enqueue_deliveries

LOCK_SECONDS = 5.0  # that a request waits for a lock, such as that of its Idempotency-Key
DECODERS = 2  # images that are decoded at once; a large one takes seconds and 300 MB
EVERYWHERE = (Unauthorized, Forbidden, Unprocessable, TooManyRequests, Unavailable)


def create_app(settings: Settings) -> FastAPI:
    """Return the application. Its settings must have a `database_url`."""
    if settings.database_url is None:
        raise ValueError("EMENDER_DATABASE_URL is not set; set it, or use `emender serve --embedded`")
    engine = connect(settings.database_url.get_secret_value(), lock_seconds=LOCK_SECONDS)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.decoders = CapacityLimiter(DECODERS)
        app.state.watcher = StatusWatcher(app.state.sessions)
        yield
        engine.dispose()

    app = FastAPIOffline(  # the files that the pages of app/api/documentation.py need
        docs_url=None,
        redoc_url=None,
        title="Emender",
        version=editing.__version__,
        summary="Edit what a text-to-image model knows, and publish the edited model as a checkpoint.",
        lifespan=lifespan,
        # Spans are exported if OTEL_EXPORTER_OTLP_ENDPOINT is set. FastAPI's logs would have the bodies of requests.
        telemetry={"auto_configure": True, "metrics": False, "logs": False},
    )
    app.state.settings = settings
    app.state.sessions = sessions(engine)
    if settings.redis_url is not None:
        from app.jobs.redis_notifier import open_notifier  # loads rq, which the API needs only with Redis

        notify_after_commit(app.state.sessions, open_notifier(settings))
    app.state.store = open_store(settings)
    app.state.rate_limits = RateLimits(settings)
    app.state.health = Health(app.state.sessions, app.state.store, app.state.rate_limits)
    app.state.database_metrics = DatabaseMetrics(app.state.sessions, folder=settings.store_dir)
    subscribe(enqueue_deliveries, actions=EVENTS)
    install_handlers(app)
    app.add_middleware(RequestMiddleware)

    for router in (keys, models, images, edits, checkpoints, evaluations, signing_keys, audit, webhooks):
        app.include_router(router, prefix="/v1", responses=documented(*EVERYWHERE))
    app.include_router(watching)
    app.include_router(documentation)
    pages.mount(app)
    app.include_router(hub)
    describe_events(app)
    describe(app)
    return app


def application() -> FastAPI:
    """Return the application with the settings of the environment, for uvicorn."""
    logging.configure()
    app = create_app(get_settings())
    # What was created so far lives as long as the process: the garbage collector need not search it again.
    gc.collect()
    gc.freeze()
    return app
