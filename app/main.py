"""The HTTP application. `uvicorn app.main:application --factory` serves it; nothing here imports torch."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

import editing
from app import problems
from app.admin import application as pages
from app.api.dependencies import TRANSACTIONS
from app.api.documentation import router as documentation
from app.api.middleware.body_limit import BodyLimit
from app.api.middleware.rate_limit import RateLimitHeaders, RateLimits, TooManyRequests
from app.api.middleware.request_log import RequestLog
from app.api.middleware.security_headers import SecurityHeaders
from app.api.openapi import describe
from app.api.waiting import Watch
from app.audit.events import subscribe
from app.audit.routes import router as audit
from app.auth.dependencies import key_lookups
from app.auth.routes import router as keys
from app.checkpoints.routes import router as checkpoints
from app.db.engine import connect, sessions
from app.edits.arrivals import arrivals
from app.edits.routes import router as edits
from app.evaluations.routes import router as evaluations
from app.hub.routes import router as hub
from app.images.routes import router as images
from app.jobs.notifier import notify_after_commit
from app.jobs.redis_notifier import open_notifier
from app.models.routes import router as models
from app.observability import logging
from app.observability.database_metrics import DatabaseMetrics
from app.observability.health import Health
from app.observability.routes import router as watching
from app.problems import Forbidden, Unauthorized, Unavailable, Unprocessable, documented
from app.settings import Settings, get_settings
from app.signing.routes import router as signing_keys
from app.storage import open_store
from app.webhooks.openapi import describe_events
from app.webhooks.routes import router as webhooks
from app.webhooks.subscriptions import enqueue_deliveries

DECODERS = 2  # uploaded images decoded at once
EVERYWHERE = (Unauthorized, Forbidden, Unprocessable, TooManyRequests, Unavailable)


def create_app(settings: Settings) -> FastAPI:
    """The application on the given settings; `database_url` must be set."""
    if settings.database_url is None:
        raise ValueError("EMENDER_DATABASE_URL is not set; set it, or use `emender serve --embedded`")
    engine = connect(settings.database_url.get_secret_value())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.transactions = CapacityLimiter(TRANSACTIONS)
        app.state.decoders = CapacityLimiter(DECODERS)
        app.state.watch = Watch(app.state.sessions)
        app.state.key_lookups = key_lookups(app)
        app.state.arrivals = arrivals(app)
        yield
        engine.dispose()

    app = FastAPIOffline(  # the files that the pages of app/api/documentation.py need
        docs_url=None,
        redoc_url=None,
        title="Emender",
        version=editing.__version__,
        summary="Correct what a text-to-image model knows, and publish the corrected text encoder as a version.",
        lifespan=lifespan,
        # FastAPI's own spans, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector; its logs would have what was sent.
        telemetry={"auto_configure": True, "metrics": False, "logs": False},
    )
    app.state.settings = settings
    app.state.sessions = sessions(engine)
    notify_after_commit(app.state.sessions, open_notifier(settings))
    app.state.store = open_store(settings)
    app.state.rate_limits = RateLimits(settings)
    app.state.health = Health(app.state.sessions, app.state.store, app.state.rate_limits)
    app.state.database_metrics = DatabaseMetrics(app.state.sessions, folder=settings.store_dir)
    subscribe(enqueue_deliveries)
    problems.install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, patience=settings.body_timeout_seconds)
    app.add_middleware(RateLimitHeaders)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestLog)

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
    """The factory that uvicorn calls."""
    logging.configure()
    app = create_app(get_settings())
    # What the start made stays: the garbage collector need not look through it again with every few hundred requests.
    gc.collect()
    gc.freeze()
    return app
