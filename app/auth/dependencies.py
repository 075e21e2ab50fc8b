"""Who asks: the API key of the request, and the scope that a route demands."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from app.auth import service
from app.auth.schemas import ApiKeyOut, Scope
from app.dependencies import SessionsDep
from app.problems import Forbidden, Unauthorized
from app.rate_limits import RateLimits, RateLimitsDep, address_of

bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer em_<id>_<secret>`")
CHALLENGE = {"WWW-Authenticate": "Bearer"}


@dataclass(frozen=True)
class Principal:
    """The key behind a request. `actor` is what rows and audit events name it by: `key:<prefix>`."""

    actor: str
    name: str
    scopes: frozenset[str]

    @classmethod
    def of(cls, key: ApiKeyOut) -> "Principal":
        return cls(actor=f"key:{key.prefix}", name=key.name, scopes=frozenset(key.scopes))

    def may(self, scope: Scope) -> bool:
        """Whether the key has `scope`; `admin` includes the others."""
        return scope in self.scopes or "admin" in self.scopes

    def require(self, scope: Scope) -> None:
        """Raise `Forbidden` without `scope`."""
        if not self.may(scope):
            raise Forbidden(f"This call needs the scope {scope!r}; the key has {', '.join(sorted(self.scopes))}.")


def authenticate(
    request: Request,
    sessions: SessionsDep,
    limits: RateLimitsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> Principal:
    """The principal of a valid key; 401 for one unknown, revoked or expired, 429 for who asks or is wrong too often."""
    if credentials is None:
        request.state.rate_limit = limits.count(address_of(request))
        raise Unauthorized("This call needs an API key: Authorization: Bearer em_…", headers=CHALLENGE)
    with sessions() as session:
        return Principal.of(find_key(request, session, limits, token=credentials.credentials))


def find_key(request: Request, session: Session, limits: RateLimits, *, token: str) -> ApiKeyOut:
    """The key of this token, counted. Raises `Unauthorized`, and `TooManyRequests` as `authenticate` says."""
    address = address_of(request)
    limits.check_key(address, token)
    key = service.authenticate(session, token=token)
    session.commit()  # that the key was used stays, whatever becomes of the request; and no lock on its row is held
    request.state.rate_limit = limits.count(f"key:{key.prefix}" if key else address)
    if key is None:
        limits.count_wrong_key(address, token)
        raise Unauthorized("This API key is unknown, was revoked or has expired.", headers=CHALLENGE)
    return key


def requires(scope: Scope) -> Callable[[Principal], Awaitable[Principal]]:
    """A dependency that lets through keys with `scope`; `admin` includes the others."""

    async def check(principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
        principal.require(scope)
        return principal

    return check


# The scope is named twice: once for the check, once for the OpenAPI document.
ReadPrincipal = Annotated[Principal, Security(requires("read"), scopes=["read"])]
EditPrincipal = Annotated[Principal, Security(requires("edit"), scopes=["edit"])]
ApplyPrincipal = Annotated[Principal, Security(requires("apply"), scopes=["apply"])]
AdminPrincipal = Annotated[Principal, Security(requires("admin"), scopes=["admin"])]
