"""Who asks: the API key of the request, and the scope that a route demands."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.auth import service
from app.auth.schemas import Scope
from app.dependencies import SessionsDep
from app.problems import Forbidden, Unauthorized
from app.rate_limits import RateLimitsDep, address_of

bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer em_<id>_<secret>`")


@dataclass(frozen=True)
class Principal:
    """The key behind a request. `actor` is what rows and audit events name it by: `key:<prefix>`."""

    actor: str
    name: str
    scopes: frozenset[str]


def authenticate(
    request: Request,
    sessions: SessionsDep,
    limits: RateLimitsDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> Principal:
    """The principal of a valid key; 401 for one unknown, revoked or expired, 429 for who asks or is wrong too often."""
    challenge, address = {"WWW-Authenticate": "Bearer"}, address_of(request)
    if credentials is None:
        request.state.rate_limit = limits.count(address)
        raise Unauthorized("This call needs an API key: Authorization: Bearer em_…", headers=challenge)
    limits.check_key(address, credentials.credentials)
    with sessions() as session:  # of its own: that the key was used stays, whatever becomes of the request
        key = service.authenticate(session, token=credentials.credentials)
        session.commit()
    request.state.rate_limit = limits.count(f"key:{key.prefix}" if key else address)
    if key is None:
        limits.count_wrong_key(address, credentials.credentials)
        raise Unauthorized("This API key is unknown, was revoked or has expired.", headers=challenge)
    return Principal(actor=f"key:{key.prefix}", name=key.name, scopes=frozenset(key.scopes))


def requires(scope: Scope) -> Callable[[Principal], Awaitable[Principal]]:
    """A dependency that lets through keys with `scope`; `admin` includes the others."""

    async def check(principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
        if scope not in principal.scopes and "admin" not in principal.scopes:
            raise Forbidden(f"This call needs the scope {scope!r}; the key has {', '.join(sorted(principal.scopes))}.")
        return principal

    return check


# The scope is named twice: once for the check, once for the OpenAPI document.
ReadPrincipal = Annotated[Principal, Security(requires("read"), scopes=["read"])]
EditPrincipal = Annotated[Principal, Security(requires("edit"), scopes=["edit"])]
ApplyPrincipal = Annotated[Principal, Security(requires("apply"), scopes=["apply"])]
AdminPrincipal = Annotated[Principal, Security(requires("admin"), scopes=["admin"])]
