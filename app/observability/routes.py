"""For those who watch the service: whether it lives, whether it is ready, and its metrics. None needs a key."""

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from app.observability.database_metrics import LedgerMetrics
from app.observability.health import Health, NotReady
from app.observability.metrics import API
from app.problems import documented

router = APIRouter(tags=["health"])


class Readiness(BaseModel):
    status: str = Field(examples=["ready"])
    degraded: dict[str, str] = Field(
        default={}, description="what is away and done without, and what that means", examples=[{}]
    )


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers; it asks nobody else."""
    return {"status": "ok"}


@router.get("/readyz", responses=documented(NotReady), response_model_exclude_defaults=True)
def readyz(request: Request) -> Readiness:
    """The database answers and has the schema of this version, and the store can be written to and read.

    A Redis that is away is `degraded`: workers then poll.
    """
    health: Health = request.app.state.health
    return Readiness(status="ready", degraded={lack.what: lack.detail for lack in health.check()})


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> PlainTextResponse:
    """What Prometheus scrapes; docs/reference/metrics.md explains each metric."""
    ledger: LedgerMetrics = request.app.state.ledger_metrics
    return PlainTextResponse(generate_latest(API) + ledger.text(), media_type=CONTENT_TYPE_LATEST)
