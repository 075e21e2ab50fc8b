"""Dashboard, alert rules and reference ask for what is exported."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from docs._generate.metrics import list_metrics

ROOT = Path(__file__).parents[2]
METRICS = list_metrics()
SERIES = {series for metric in METRICS for series in metric.series} | {"up", "process_resident_memory_bytes"}
LABELS = {label for metric in METRICS for label in metric.labels} | {"job", "instance", "le", "version"}
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/emender.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

TEXT = {"type": "string", "minLength": 1}
RULE = {
    "type": "object",
    "required": ["alert", "expr", "for", "labels", "annotations"],
    "additionalProperties": False,
    "properties": {
        "alert": {"type": "string", "pattern": "^Emender[A-Za-z]+$"},
        "expr": TEXT,
        "for": {"type": "string", "pattern": "^[0-9]+[smh]$"},
        "labels": {
            "type": "object",
            "required": ["severity"],
            "properties": {"severity": {"enum": ["page", "ticket"]}},
        },
        "annotations": {"type": "object", "required": ["summary", "next"], "additionalProperties": TEXT},
    },
}
GROUPS = {
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {
        "groups": {
            "items": {
                "required": ["name", "rules"],
                "additionalProperties": False,
                "properties": {"name": TEXT, "rules": {"type": "array", "minItems": 10, "items": RULE}},
            }
        }
    },
}


def expressions() -> list[str]:
    alerts = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    return alerts + [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_rules_are_rules() -> None:
    jsonschema.validate(RULES, GROUPS)
    names = [rule["alert"] for group in RULES["groups"] for rule in group["rules"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_for_is_exported(expression: str) -> None:
    bare = re.sub(r'"[^"]*"', '""', expression)
    asked = set(re.findall(r"\b(?:emender_\w+|process_\w+|up\b(?=\{))", bare))
    assert asked and asked <= SERIES
    grouped = [name.strip() for group in re.findall(r"\bby \(([^)]*)\)", bare) for name in group.split(",")]
    matched = re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"\"", bare)
    assert {*grouped, *matched} <= LABELS


def test_every_metric_is_on_the_dashboard() -> None:
    """The dashboard shows each exported metric, or its sum."""
    shown = " ".join(expressions())
    assert [metric.name for metric in METRICS if not any(series in shown for series in metric.series)] == []


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
