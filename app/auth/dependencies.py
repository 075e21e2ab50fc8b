"""Who asks: the API key of the request, and the scope that a route demands."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.api.middleware.rate_limit import RateLimits, TooManyRequests, address_of
from app.api.request_batching import Gathered
from app.auth import service
from app.problems import Forbidden, Problem, Unauthorized
from emender.schemas.keys import ApiKeyOut, Scope

bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer em_<id>_<secret>`")
Documented = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
"""Names the key in the OpenAPI document; `authenticate` reads it."""
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


Presented = tuple[Request, str]
"""A request and the token that it came with."""


async def authenticate(request: Request) -> Principal:
    """The principal of a valid key; 401 for one unknown, revoked or expired, 429 for who asks or is wrong too often.

    Looked up and counted once, however often a request asks for it.
    """
    known: Principal | None = getattr(request.state, "authenticated", None)
    if known is not None:
        return known
    credentials = await bearer(request)
    if credentials is None:
        limits: RateLimits = request.app.state.rate_limits
        request.state.rate_limit = await run_in_threadpool(limits.count, address_of(request))
        raise Unauthorized("This call needs an API key: Authorization: Bearer em_…", headers=CHALLENGE)
    lookups: Gathered[Presented, ApiKeyOut] = request.app.state.key_lookups
    principal = Principal.of(await lookups.ask((request, credentials.credentials)))
    request.state.authenticated = principal
    return principal


def key_lookups(app: FastAPI) -> Gathered[Presented, ApiKeyOut]:
    """Looks up the keys of all requests that wait, each after it came: one that was revoked before is refused."""

    def find(presented: Sequence[Presented]) -> list[ApiKeyOut | Problem]:
        with app.state.sessions() as session:
            return find_keys(session, app.state.rate_limits, presented)

    return Gathered(find)


def find_keys(session: Session, limits: RateLimits, presented: Sequence[Presented]) -> list[ApiKeyOut | Problem]:
    """The key of each token, its request counted; or what is to be answered instead, as `authenticate` says.

    Commits that they were used, whatever becomes of the requests; no lock on their rows is held.
    """
    refused = [_refusal(limits, request, token) for request, token in presented]
    asked = [each for each, refusal in zip(presented, refused, strict=True) if refusal is None]
    keys = service.authenticate(session, tokens=[token for _, token in asked])
    session.commit()
    counted = iter([_counted(limits, *each, key) for each, key in zip(asked, keys, strict=True)])
    return [refusal or next(counted) for refusal in refused]


def _counted(limits: RateLimits, request: Request, token: str, key: ApiKeyOut | None) -> ApiKeyOut | Problem:
    address = address_of(request)
    try:
        request.state.rate_limit = limits.count(f"key:{key.prefix}" if key else address)
        if key is None:
            limits.count_wrong_key(address, token)
    except TooManyRequests as refusal:
        return refusal
    return key or Unauthorized("This API key is unknown, was revoked or has expired.", headers=CHALLENGE)


def _refusal(limits: RateLimits, request: Request, token: str) -> Problem | None:
    try:
        limits.check_key(address_of(request), token)
    except TooManyRequests as refusal:
        return refusal
    return None


def requires(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """A dependency that lets through keys with `scope`; `admin` includes the others."""

    async def check(request: Request, _: Documented = None) -> Principal:
        principal = await authenticate(request)
        principal.require(scope)
        return principal

    return check


# The scope is named twice: once for the check, once for the OpenAPI document.
ReadPrincipal = Annotated[Principal, Security(requires("read"), scopes=["read"])]
EditPrincipal = Annotated[Principal, Security(requires("edit"), scopes=["edit"])]
ApplyPrincipal = Annotated[Principal, Security(requires("apply"), scopes=["apply"])]
AdminPrincipal = Annotated[Principal, Security(requires("admin"), scopes=["admin"])]
