"""The readiness checks of one process."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.api.rate_limit import RateLimits
from app.db.engine import Sessions
from app.db.migrate import SchemaBehind, check_schema
from app.observability.cached import CACHE_SECONDS, Cached
from app.problems import Unavailable
from app.storage.store import Store
from emender.schemas.common import FieldError


class NotReady(Unavailable):
    """A dependency is missing; `errors` names each."""


@dataclass(frozen=True)
class Degraded:
    """A dependency that is unavailable, and that the service can do without for a while."""

    name: str
    detail: str


class Health:
    """The checks of `/readyz`."""

    def __init__(self, sessions: Sessions, store: Store, limits: RateLimits) -> None:
        self.sessions, self.store, self.limits = sessions, store, limits
        self.store_problem = Cached(
            self._probe_store, initial="The store has not been checked yet.", seconds=CACHE_SECONDS
        )

    def check(self) -> Sequence[Degraded]:
        """Return what is degraded. Raises `NotReady` with every dependency that is missing."""
        missing, degraded = [], []
        try:
            with self.sessions() as session:
                session.execute(text("SET LOCAL statement_timeout = 2000"))
                if not check_schema(session):
                    degraded.append(Degraded("schema", "It is newer than this version; update the service."))
        except SchemaBehind as behind:
            missing.append(FieldError(pointer="schema", detail=str(behind)))
        except SQLAlchemyError as error:
            detail = f"The database of EMENDER_DATABASE_URL does not respond ({type(error).__name__})."
            missing.append(FieldError(pointer="database", detail=detail))
        if problem := self.store_problem.get():
            missing.append(FieldError(pointer="store", detail=problem))
        if self.limits.redis_responds() is False:
            detail = "It does not respond: workers poll Postgres, and each process counts requests for itself."
            degraded.append(Degraded("redis", detail))
        if missing:
            details = " ".join(error.detail for error in missing)
            raise NotReady(details, errors=missing, headers={"Retry-After": "2"})
        return degraded

    def _probe_store(self) -> str:
        try:
            self.store.probe()
        except OSError as error:
            return f"The store cannot be written to and read: {error.strerror or type(error).__name__}."
        return ""
