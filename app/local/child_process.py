"""Child processes that do not outlive us."""

import ctypes
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def ends_with_parent(ending: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """For Popen's `preexec_fn`: the kernel sends the child `ending` when its parent dies, even by `kill -9`.

    Linux only (prctl(2)); None elsewhere. The child must be started from the main thread, whose end is what counts.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork, where it is safe

    def preexec() -> None:
        prctl(PR_SET_PDEATHSIG, int(ending))

    return preexec
