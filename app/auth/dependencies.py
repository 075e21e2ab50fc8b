"""Authentication: the principal of a request and the scope that an endpoint requires."""

from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.auth import service
from app.auth.service import Principal, ScopeMissing
from app.problems import Unauthorized
from emender.schemas.keys import Scope

Credentials = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(auto_error=False, description="`Authorization: Bearer em_<id>_<secret>`")),
]


class RequireScope:
    """Return the principal of a request, whose key must have the scope. Raises 401, 403 or 429.

    Counts the request against the rate limits.
    """

    def __init__(self, scope: Scope | None) -> None:
        self.scope = scope

    def __call__(self, request: Request, credentials: Credentials) -> Principal:
        token = credentials.credentials if credentials else None
        principal = None
        if token is not None:
            with request.app.state.sessions() as session:
                principal = service.find_principal(session, token=token)
                if session.dirty:  # the time of last use
                    session.commit()
        host = request.client.host if request.client else ""
        actor = principal.actor if principal else None
        request.state.rate_limit_headers = request.app.state.rate_limits.count(host, token=token, actor=actor)
        if principal is None:
            detail = "The API key is unknown, revoked or expired." if token else "Send an API key as a Bearer token."
            raise Unauthorized(detail, headers={"WWW-Authenticate": "Bearer"})
        if self.scope is not None and not principal.scopes & {self.scope, "admin"}:
            raise ScopeMissing(principal, self.scope)
        request.state.principal = principal
        return principal


# Each scope is named twice: for the check and for the OpenAPI document.
ReadPrincipal = Annotated[Principal, Security(RequireScope("read"), scopes=["read"])]
EditPrincipal = Annotated[Principal, Security(RequireScope("edit"), scopes=["edit"])]
ApplyPrincipal = Annotated[Principal, Security(RequireScope("apply"), scopes=["apply"])]
AdminPrincipal = Annotated[Principal, Security(RequireScope("admin"), scopes=["admin"])]
