"""The table of clients and calls, written to the path of `--clients-table`."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.app.checkpoints.conftest import base_folder, service
from tests.app.conftest import settings
from tests.app.hub.conftest import server
from tests.deploy.conftest import wire

__all__ = ["base_folder", "server", "service", "settings", "wire"]

Table = dict[str, dict[str, bool]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clients-table", type=Path, help="write a Markdown table of clients and calls there")


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Whether each call passed, by the client's version."""
    found: Table = {}
    yield found
    path = request.config.getoption("--clients-table", default=None)
    if path is not None and found:
        path.write_text(as_markdown(found), encoding="utf-8")


def as_markdown(found: Table) -> str:
    calls = list(dict.fromkeys(call for answers in found.values() for call in answers))
    lines = [
        "# Clients",
        "",
        "What `make clients` found: each client in an environment of its own (`tests/clients/requirements-*.txt`), "
        f"against a running server. {datetime.now(UTC):%d %B %Y}.",
        "",
        f"These calls work with huggingface_hub {', '.join(found)}, except where a version is named:",
        "",
    ]
    words: dict[bool | None, str] = {False: "fails", None: "was not run"}
    for call in calls:
        results = {version: answers.get(call) for version, answers in found.items()}
        exceptions = [f"**{words[passed]} with {version}**" for version, passed in results.items() if not passed]
        lines.append(": ".join([f"- `{call}`", *filter(None, [", ".join(exceptions)])]))
    return "\n".join(lines) + "\n"
