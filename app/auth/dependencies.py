"""Who asks: the API key of the request, and the scope that a route demands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.auth import service
from app.auth.schemas import Scope
from app.dependencies import SessionDep
from app.problems import Forbidden, Unauthorized

bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer em_<id>_<secret>`")


@dataclass(frozen=True)
class Principal:
    """The key behind a request. `actor` is what rows and audit events name it by: `key:<prefix>`."""

    actor: str
    name: str
    scopes: frozenset[str]


def authenticate(
    session: SessionDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> Principal:
    """The principal of a valid, unrevoked key; 401 otherwise."""
    challenge = {"WWW-Authenticate": "Bearer"}
    if credentials is None:
        raise Unauthorized("This call needs an API key: Authorization: Bearer em_…", headers=challenge)
    key = service.authenticate(session, token=credentials.credentials)
    session.commit()  # that the key was used stays, whatever becomes of the request; and no lock on its row is held
    if key is None:
        raise Unauthorized("This API key is unknown or was revoked.", headers=challenge)
    return Principal(actor=f"key:{key.prefix}", name=key.name, scopes=frozenset(key.scopes))


def requires(scope: Scope) -> Callable[[Principal], Principal]:
    """A dependency that lets through keys with `scope`; `admin` includes the others."""

    def check(principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
        if scope not in principal.scopes and "admin" not in principal.scopes:
            raise Forbidden(f"This call needs the scope {scope!r}; the key has {', '.join(sorted(principal.scopes))}.")
        return principal

    return check


ReadPrincipal = Annotated[Principal, Depends(requires("read"))]
EditPrincipal = Annotated[Principal, Depends(requires("edit"))]
ApplyPrincipal = Annotated[Principal, Depends(requires("apply"))]
AdminPrincipal = Annotated[Principal, Depends(requires("admin"))]
