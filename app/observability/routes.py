"""Liveness, readiness and metrics. None of them needs a key."""

import os

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import BaseModel, Field

from app.observability.database_metrics import DatabaseMetrics
from app.observability.health import Health, NotReady
from app.observability.metrics import API, API_PROCESS
from app.problems import documented

router = APIRouter(tags=["health"])


class Readiness(BaseModel):
    status: str = Field(examples=["ready"])
    degraded: dict[str, str] = Field(
        default={}, description="Unavailable dependencies that the service does without, and the effect.", examples=[{}]
    )


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Check that the process responds. Uses no other service."""
    return {"status": "ok"}


@router.get("/readyz", responses=documented(NotReady), response_model_exclude_defaults=True)
def readyz(request: Request) -> Readiness:
    """Check that the database responds with the schema of this version, and that the store can be written and read.

    An unavailable Redis is `degraded`: workers poll.
    """
    health: Health = request.app.state.health
    return Readiness(status="ready", degraded={dependency.name: dependency.detail for dependency in health.check()})


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> PlainTextResponse:
    """Return the metrics for Prometheus; docs/reference/metrics.md explains each metric."""
    database: DatabaseMetrics = request.app.state.database_metrics
    text = generate_latest(API_PROCESS) + generate_latest(_api_registry()) + database.text()
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


def _api_registry() -> CollectorRegistry:
    """Return the metrics of all API processes if they share PROMETHEUS_MULTIPROC_DIR, else of this one."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return API
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry
