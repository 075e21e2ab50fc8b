"""How much memory a process and its descendants hold at once."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")


class PeakMemory:
    """Samples the proportional set size of this process and all below it; pages that they share count once.

    `peak_mb` is 0 where there is no /proc.
    """

    def __init__(self, *, interval: float = 0.5) -> None:
        self.interval = interval
        self.peak_mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, sum(map(held_mb, descendants(os.getpid()))))
            if self._ended.wait(self.interval):
                return


def descendants(root: int) -> list[int]:
    """Return the process and all that it started, directly or not."""
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        children.setdefault(int(after_name[1]), []).append(int(folder.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def held_mb(process: int) -> float:
    """Its proportional set size in MB; 0 once it has ended."""
    try:
        lines = (PROC / str(process) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000
