"""What Prometheus is told of a process, each metric with its meaning; what is read from the database is in `ledger`.

Labels have few values, all of them ours: no name that a client chose, no prompt, no key, no id.
"""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector

import editing

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for

API = CollectorRegistry()
"""Of the process that answers HTTP, at its `/metrics`."""
WORKER = CollectorRegistry()
"""Of a worker, at EMENDER_METRICS_PORT."""

for registry in (API, WORKER):
    Info("emender", "The version that runs.", registry=registry).info({"version": editing.__version__})
    ProcessCollector(registry=registry)

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WORK = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 4 * 3600)
LOSS = tuple(10.0**power for power in range(-6, 3))
SHARE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1)

REQUESTS = Counter(
    "emender_http_requests",
    "Requests that were answered, by the template of their route.",
    ["method", "route", "status"],
    registry=API,
)
REQUEST_SECONDS = Histogram(
    "emender_http_request_seconds",
    "Seconds from a request to the beginning of its answer.",
    ["method", "route"],
    buckets=LATENCY,
    registry=API,
)
PULLS = Counter(
    "emender_pulls",
    "GETs of files: `sent` by the service, `redirected` to the bucket, `unchanged` at the client.",
    ["how"],
    registry=API,
)
PULLED_BYTES = Counter("emender_pulled_bytes", "Bytes of files that the service sent.", registry=API)
REFUSED = Counter(
    "emender_requests_refused",
    "Requests refused for coming too often: of a client, or with wrong keys.",
    ["limit"],
    registry=API,
)
for how in ("sent", "redirected", "unchanged"):
    PULLS.labels(how)
for limit in ("requests", "wrong-keys", "wrong-key"):
    REFUSED.labels(limit)

JOB_SECONDS = Histogram(
    "emender_job_seconds",
    "Seconds from the claim of a job to its end; `released`: the worker was told to stop.",
    ["kind", "outcome"],
    buckets=WORK,
    registry=WORKER,
)
STAGE_SECONDS = Histogram(
    "emender_stage_seconds",
    "Seconds of a stage: a batch of edits in stage I, an encoder in stage II, a version elsewhere.",
    ["stage"],
    buckets=WORK,
    registry=WORKER,
)
FINAL_LOSS = Histogram(
    "emender_stage_one_loss", "Losses at the end of stage I, of each edit.", ["loss"], buckets=LOSS, registry=WORKER
)
RESIDUAL = Histogram(
    "emender_residual",
    "What a published version leaves undone of each edit; 0: nothing, 1: all.",
    ["method"],
    buckets=SHARE,
    registry=WORKER,
)
LEASES_LOST = Counter("emender_leases_lost", "Leases that this worker lost while it computed.", registry=WORKER)
LEASES_EXPIRED = Counter(
    "emender_leases_expired",
    "Leases of dead workers that this worker found, by what became of the job.",
    ["kind", "outcome"],
    registry=WORKER,
)
WEBHOOK_TRIES = Counter("emender_webhook_tries", "Webhooks sent, by outcome.", ["outcome"], registry=WORKER)
