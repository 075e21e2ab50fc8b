"""Who looks at a page: the key that its session was begun with. And proof that a form is one of ours."""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Form, Request, Response

from app.api.dependencies import SessionDep
from app.api.middleware.rate_limit import RateLimitsDep, address_of
from app.api.routing import TransactionRoute
from app.auth import browser_sessions
from app.auth.dependencies import Principal
from app.problems import Forbidden, Unauthorized
from emender.schemas.keys import Scope

COOKIE = "emender_session"


def get_principal(request: Request, session: SessionDep, limits: RateLimitsDep) -> Principal:
    """The principal of the session's key; 401 where it has ended or never began."""
    token = request.cookies.get(COOKIE)
    key = browser_sessions.find_key(session, token=token) if token else None
    request.state.rate_limit = limits.count(f"key:{key.prefix}" if key else address_of(request))
    if key is None:
        raise Unauthorized("Sign in to see this page.")
    request.state.principal = Principal.of(key)
    return Principal.of(key)


def requires(scope: Scope) -> Callable[[Principal], Principal]:
    """A dependency that lets through sessions of keys with `scope`, as the calls of the API do."""

    def check(principal: Annotated[Principal, Depends(get_principal)]) -> Principal:
        principal.require(scope)
        return principal

    return check


Reader = Annotated[Principal, Depends(requires("read"))]
Editor = Annotated[Principal, Depends(requires("edit"))]
Applier = Annotated[Principal, Depends(requires("apply"))]
Admin = Annotated[Principal, Depends(requires("admin"))]


def set_cookie(request: Request, response: Response, token: str) -> None:
    response.set_cookie(
        COOKIE,
        token,
        max_age=int(browser_sessions.LIFETIME.total_seconds()),
        path=request.scope["root_path"],
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def form_token(token: str) -> str:
    """What the forms of the pages carry for the session `token`: nobody else's page can know it."""
    return hmac.new(token.encode(), b"form", hashlib.sha256).hexdigest()


def check_form(request: Request, given: Annotated[str, Form(alias="form_token")] = "") -> None:
    """Raises `Forbidden` for a form that is none of ours, or of another session."""
    token = request.cookies.get(COOKIE)
    if token is None or not hmac.compare_digest(form_token(token).encode(), given.encode(errors="replace")):
        raise Forbidden("This form is not of your present session; go back, load its page again and send it again.")


class PageRoute(TransactionRoute):
    """Every POST is a form of ours: `APIRouter(route_class=PageRoute)`."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            options["dependencies"] = [Depends(check_form), *(options.get("dependencies") or ())]
        super().__init__(path, endpoint, **options)


def visitor(request: Request) -> str:
    """The token of someone who has not signed in: it names no session, and lets the form for signing in be checked."""
    return request.cookies.get(COOKIE) or secrets.token_urlsafe(32)
