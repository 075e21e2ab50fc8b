"""The Prometheus metrics that a process counts. `database_metrics` has those that are read from the database.

Labels have few values, all defined here or in the code: no name of a client's, no prompt, no key, no id.
"""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector

import editing

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # an unused second series per counter

API = CollectorRegistry()
"""Metrics of the API, served at its `/metrics`."""
API_PROCESS = CollectorRegistry()
"""Metrics of the API process that serves the request."""
WORKER = CollectorRegistry()
"""Metrics of a worker, served at EMENDER_METRICS_PORT."""

for registry in (API_PROCESS, WORKER):
    Info("emender", "The version that runs.", registry=registry).info({"version": editing.__version__})
    ProcessCollector(registry=registry)

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WORK = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 4 * 3600)
LOSS = tuple(10.0**power for power in range(-6, 3))
SHARE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1)

REQUESTS = Counter("emender_http_requests", "Requests, by route template.", ["method", "route", "status"], registry=API)
REQUEST_SECONDS = Histogram(
    "emender_http_request_seconds",
    "Seconds from a request to the start of its response.",
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
LIMITED_REQUESTS = Counter(
    "emender_requests_refused",
    "Requests over a rate limit: of a client, or with wrong keys.",
    ["limit"],
    registry=API,
)
for how in ("sent", "redirected", "unchanged"):
    PULLS.labels(how)
for limit in ("requests", "wrong-keys", "wrong-key"):
    LIMITED_REQUESTS.labels(limit)

JOB_SECONDS = Histogram(
    "emender_job_seconds",
    "Seconds from the claim of a job to its end; `released`: the worker was stopped.",
    ["kind", "outcome"],
    buckets=WORK,
    registry=WORKER,
)
STAGE_SECONDS = Histogram(
    "emender_stage_seconds",
    "Seconds of a stage: a batch of edits in stage I, an encoder in stage II, a checkpoint otherwise.",
    ["stage"],
    buckets=WORK,
    registry=WORKER,
)
FINAL_LOSS = Histogram(
    "emender_stage_one_loss", "Final losses of each edit in stage I.", ["loss"], buckets=LOSS, registry=WORKER
)
RESIDUAL = Histogram(
    "emender_residual",
    "Relative residual of each edit of a published checkpoint. 0: fully applied, 1: no effect.",
    ["method"],
    buckets=SHARE,
    registry=WORKER,
)
LEASES_LOST = Counter("emender_leases_lost", "Leases that this worker lost while it ran a job.", registry=WORKER)
LEASES_EXPIRED = Counter(
    "emender_leases_expired",
    "Expired leases of dead workers that this worker found, by what became of the job.",
    ["kind", "outcome"],
    registry=WORKER,
)
NOTIFIER_ERRORS = Counter(
    "emender_notifier_errors", "Rounds of maintenance in which Redis did not answer.", registry=WORKER
)
WEBHOOK_TRIES = Counter(
    "emender_webhook_tries", "Attempts to send a webhook, by outcome.", ["outcome"], registry=WORKER
)
