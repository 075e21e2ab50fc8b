"""How many examples a property is tried with: few in `make test`, many in `make properties`."""

from collections import Counter
from pathlib import Path

import pytest

from tests.app.conftest import built, plain_logs, settings, store

__all__ = ["built", "plain_logs", "settings", "store"]

HERE = Path(__file__).parent
CASES: Counter[str] = Counter()
"""By property, how many examples were run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--property-examples", type=int, default=2, help="per operation, key and kind of data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.properties)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in sorted(CASES.items()):
        terminalreporter.write_line(f"{name}: {count} cases")


@pytest.fixture(scope="session")
def examples(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--property-examples")
    return count
