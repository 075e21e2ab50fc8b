"""Share one slow reading among concurrent requests."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

CACHE_SECONDS = 5.0


class Cached(Generic[T]):
    """Call `read` at most once in `seconds`, by one thread at a time. Other callers get the last result at once."""

    def __init__(self, read: Callable[[], T], *, initial: T, seconds: float) -> None:
        self.seconds = seconds
        self._read = read
        self._value = initial
        self._lock = threading.Lock()
        self._read_at = float("-inf")  # monotonic seconds

    def get(self) -> T:
        if self._lock.acquire(blocking=False):
            try:
                if time.monotonic() - self._read_at >= self.seconds:
                    self._value = self._read()
                    self._read_at = time.monotonic()
            finally:
                self._lock.release()
        return self._value
