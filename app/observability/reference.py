"""Every metric as documentation: `python -m app.observability.reference > docs/reference/metrics.md`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from sqlalchemy.orm import sessionmaker

from app.observability.database_metrics import LedgerMetrics
from app.observability.metrics import API, WORKER

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",), "gauge": ("",)}

INTRODUCTION = """\
# Metrics

Made from the metrics' own definitions by `python -m app.observability.reference`.

The API answers Prometheus at `/metrics`, without a key: let only your own network reach it, as `deploy/k8s` does.
A worker answers at `EMENDER_METRICS_PORT` of `EMENDER_HOST`; without that setting, nowhere. Several workers of one
`emender serve` take ports one after another. `deploy/prometheus` has a configuration and alert rules,
`deploy/grafana/emender.json` is a dashboard.

Labels have few values, all of them ours. Beside these there are the `process_…` metrics of every Prometheus client.
A histogram has the series `_bucket`, `_sum` and `_count`.
"""


@dataclass(frozen=True)
class Described:
    """A metric. `series` are the names that expressions use."""

    name: str
    kind: str
    meaning: str
    labels: Sequence[str]

    @property
    def series(self) -> list[str]:
        return [self.name + suffix for suffix in SUFFIXES[self.kind]]


def described(registry: CollectorRegistry) -> Iterator[Described]:
    """Those of a registry, as they were defined."""
    for collector in registry._collector_to_names:
        describe = getattr(collector, "describe", None)
        for metric in describe() if describe else ():
            names: Any = getattr(metric, "_labelnames", None) or getattr(collector, "_labelnames", ())
            yield Described(metric.name, metric.type, metric.documentation, tuple(names))


SECTIONS = {
    "The service, as the database has it (API)": LedgerMetrics(sessionmaker(), folder=Path()).registry,
    "A process of the API": API,
    "A worker": WORKER,
}


def reference() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for title, registry in SECTIONS.items():
        lines = [f"## {title}", "", "| metric | kind | labels | |", "|---|---|---|---|"]
        for metric in described(registry):
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            name = metric.name if metric.kind == "histogram" else metric.series[0]
            lines.append(f"| `{name}` | {metric.kind} | {labels} | {metric.meaning} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(reference())
