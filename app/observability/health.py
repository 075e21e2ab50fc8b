"""Whether this process can do its work now, and what it lacks."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.api.middleware.rate_limit import RateLimits
from app.db.engine import Sessions
from app.db.migrate import SchemaBehind, check
from app.problems import Unavailable
from app.storage.store import Store
from emender.schemas.common import FieldError

PAUSE_SECONDS = 5.0
"""However often it is asked, the store is probed once in so long."""


class NotReady(Unavailable):
    title = "Not ready"


@dataclass(frozen=True)
class Degraded:
    """What is away and can be done without for a while."""

    what: str
    detail: str


class Health:
    """The checks of `/readyz`."""

    def __init__(self, sessions: Sessions, store: Store, limits: RateLimits, *, pause: float = PAUSE_SECONDS) -> None:
        self.sessions, self.store, self.limits, self.pause = sessions, store, limits, pause
        self._lock = threading.Lock()
        self._probed_at = -1e9  # monotonic seconds
        self._store_problem: str | None = "The store was not looked at yet."

    def check(self) -> Sequence[Degraded]:
        """What is degraded. Raises `NotReady`, which names everything that is missing."""
        missing, degraded = [], []
        try:
            with self.sessions() as session:
                session.execute(text("SET LOCAL statement_timeout = 2000"))
                if not check(session):
                    degraded.append(Degraded("schema", "It is newer than this version, which is to be replaced."))
        except SchemaBehind as behind:
            missing.append(FieldError(pointer="schema", detail=str(behind)))
        except SQLAlchemyError as error:
            detail = f"The database of EMENDER_DATABASE_URL does not answer ({type(error).__name__})."
            missing.append(FieldError(pointer="database", detail=detail))
        problem = self._store()
        if problem is not None:
            missing.append(FieldError(pointer="store", detail=problem))
        if self.limits.redis_answers() is False:
            detail = "It does not answer: workers poll Postgres, and each process counts requests for itself."
            degraded.append(Degraded("redis", detail))
        if missing:
            what = " ".join(error.detail for error in missing)
            raise NotReady(what, errors=missing, headers={"Retry-After": "2"})
        return degraded

    def _store(self) -> str | None:
        """What is wrong with it. While one request waits for a store that hangs, the others are told the last."""
        if self._lock.acquire(blocking=False):
            try:
                if time.monotonic() - self._probed_at >= self.pause:
                    self._store_problem = self._probe()
                    self._probed_at = time.monotonic()
            finally:
                self._lock.release()
        return self._store_problem

    def _probe(self) -> str | None:
        try:
            self.store.probe()
        except OSError as error:
            return f"The store cannot be written to and read: {error.strerror or type(error).__name__}."
        return None
