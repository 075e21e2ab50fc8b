"""Child processes that are restarted when they end, and that do not outlive their parent."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import structlog

log = structlog.get_logger()

PR_SET_PDEATHSIG = 1
MAX_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 60.0  # a process that ran this long is restarted at once


def die_with_parent(ending: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """Return a `preexec_fn` for Popen: the kernel sends `ending` when the parent dies, even by `kill -9`.

    Linux only (prctl(2)); None elsewhere. Start the child from the main thread: the end of that thread counts.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork, where that is safe

    def preexec() -> None:
        prctl(PR_SET_PDEATHSIG, int(ending))

    return preexec


class ManagedProcess:
    """A Python module in a child process. Secrets reach it by its environment, not by its command line."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.command = [sys.executable, "-m", *arguments]
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = self._restart_at = 0.0  # monotonic seconds
        self._failures = 0

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C reaches the parent only."""
        self._process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        self._started_at, self._restart_at = time.monotonic(), 0.0

    def restart_if_ended(self) -> None:
        """Restart the process if it ended, after a pause that doubles with each failure in a row."""
        if self._process is None or self.is_running:
            return
        now = time.monotonic()
        if not self._restart_at:
            self._failures = 1 if now - self._started_at > HEALTHY_SECONDS else self._failures + 1
            pause = min(2.0 ** (self._failures - 1) - 1, MAX_BACKOFF_SECONDS)
            self._restart_at = now + pause
            log.warning("process ended; restarting", process=self.name, status=self._process.returncode, seconds=pause)
        if now >= self._restart_at:
            self.start()

    def terminate(self) -> None:
        """Ask the process to end. Does nothing if it is not running."""
        if self._process is not None:
            self._process.terminate()

    def wait(self, deadline: float) -> None:
        """Wait for the end of the process until `deadline` (monotonic seconds), then kill it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("process did not end in time; killing it", process=self.name)
            self._process.kill()
            self._process.wait()
