"""What became of each fault, as a list: printed at the end, and written where `--faults-table` says."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import pytest

SOAK = "\n## Soak\n"
INPUT = "## Input from users\n"  # written by hand; its tests are in the default run
HEAD = """\
# Faults

What `make faults` measured: `tests/faults/` kills, stops, fills and restarts real processes. In parentheses is the time
from the fault, or from its end where that is said, until the work was done. No accepted work was lost or done twice,
except where that is said. Most tests have leases of 6 seconds, and longer ones on a busy
machine; the default is 30.
"""


@dataclass(frozen=True)
class Outcome:
    """One line of the list."""

    row: int
    fault: str
    recovery: float | None = None
    """Seconds; None where there is nothing to wait for."""
    lost: int = 0
    doubled: int = 0
    note: str = ""


@dataclass
class Outcomes:
    """What the tests of this run have found."""

    KEY: ClassVar[pytest.StashKey["Outcomes"]] = pytest.StashKey()
    lines: list[Outcome] = field(default_factory=list)
    soak: str = ""

    def describe(self) -> str:
        """Return a list of faults with recovery and result."""
        lines = []
        for found in sorted(self.lines, key=lambda found: found.row):
            recovery = "" if found.recovery is None else f" ({found.recovery:.1f} s)"
            results = [f"{count} {name}" for name, count in (("lost", found.lost), ("doubled", found.doubled)) if count]
            results += [found.note] if found.note else []
            lines.append(f"- {found.fault}{recovery}{': ' if results else ''}{'; '.join(results)}")
        return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", type=Path, help="write a Markdown list of faults and outcomes there")
    parser.addoption("--soak-seconds", type=float, default=900.0, help="how long faults are injected under load")
    parser.addoption("--soak-seed", type=int, default=None, help="of the random faults; default: another each time")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[Outcomes.KEY] = Outcomes()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Print it; write it where all passed. Other parts of the file are kept: faults and soak are runs of their own."""
    found = config.stash[Outcomes.KEY]
    if not (found.lines or found.soak):
        return
    terminalreporter.section("outcomes of faults")
    terminalreporter.write_line(found.describe() if found.lines else found.soak)
    path = config.getoption("--faults-table", default=None)  # none where this file was read late
    if path is None or exitstatus:
        return
    measured, _, tested = (path.read_text(encoding="utf-8") if path.exists() else HEAD).partition(INPUT)
    before, _, soak = measured.partition(SOAK)
    today = f"{datetime.now(UTC):%d %B %Y}"
    if found.lines:
        before = f"{HEAD}\n{today}.\n\n{found.describe()}"
    if found.soak:
        soak = f"\n{today}, `make soak`.\n\n{found.soak}"
    measured = (before + (SOAK + soak if soak else "")).rstrip("\n") + "\n"
    path.write_text(measured + (f"\n{INPUT}{tested}" if tested else ""), encoding="utf-8")
