"""Log an outage when it begins and when it ends, instead of at each attempt."""

import structlog

log = structlog.get_logger()


class Outage:
    """The outage of a dependency. `begun` and `ended` are what the log says of it."""

    def __init__(self, begun: str, *, ended: str | None = None) -> None:
        self._begun, self._ended = begun, ended
        self._lasts = False

    def begin(self, **facts: str) -> None:
        """Log that the outage began, with these facts. Does nothing if it lasts already."""
        if not self._lasts:
            log.warning(self._begun, **facts)
        self._lasts = True

    def end(self) -> None:
        """Note that the dependency responds again."""
        if self._lasts and self._ended is not None:
            log.info(self._ended)
        self._lasts = False
