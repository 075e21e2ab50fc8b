"""Scale the waits of tests that start processes to the load of the machine."""

import os


def patience(seconds: float) -> float:
    """Return how long to wait now for what takes at most `seconds` on an idle machine."""
    return seconds * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))
