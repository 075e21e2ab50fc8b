"""Sessions of the pages: the key that a session was started with, its cookie, and the token of its forms."""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Form, Request, Response

from app.api.routing import TransactionRoute
from app.auth import browser_sessions
from app.auth.service import Principal, ScopeMissing
from app.problems import Forbidden, Unauthorized
from emender.schemas.keys import Scope

COOKIE = "emender_session"


def get_principal(request: Request) -> Principal:
    """Return the principal of the session's key. Raises `Unauthorized` without a valid session."""
    token = request.cookies.get(COOKIE)
    with request.app.state.sessions() as session:
        principal = browser_sessions.find_principal(session, token=token) if token else None
    host = request.client.host if request.client else ""
    actor = principal.actor if principal else None
    request.state.rate_limit_headers = request.app.state.rate_limits.count(host, actor=actor)
    if principal is None:
        raise Unauthorized("Sign in to see this page.")
    request.state.principal = principal
    return principal


def require_scope(scope: Scope) -> Callable[[Principal], Principal]:
    """Return a dependency that requires a session of a key with this scope."""

    def check(principal: Annotated[Principal, Depends(get_principal)]) -> Principal:
        if not principal.may(scope):
            raise ScopeMissing(principal, scope)
        return principal

    return check


Reader = Annotated[Principal, Depends(require_scope("read"))]
Editor = Annotated[Principal, Depends(require_scope("edit"))]
Applier = Annotated[Principal, Depends(require_scope("apply"))]
Admin = Annotated[Principal, Depends(require_scope("admin"))]


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


def anonymous_token(request: Request) -> str:
    """Return a token for the sign-in form. It names no session, and lets the form be checked."""
    return request.cookies.get(COOKIE) or secrets.token_urlsafe(32)


def form_token(token: str) -> str:
    """Return what the forms of a session carry. Pages of other sites cannot know it."""
    return hmac.new(token.encode(), b"form", hashlib.sha256).hexdigest()


def check_form(request: Request, sent: Annotated[str, Form(alias="form_token")] = "") -> None:
    """Raise `Forbidden` for a form of another site or of another session."""
    token = request.cookies.get(COOKIE)
    if token is None or not hmac.compare_digest(form_token(token).encode(), sent.encode(errors="replace")):
        raise Forbidden("This form does not belong to your session. Go back, reload its page and send it again.")


class PageRoute(TransactionRoute):
    """A route whose POST is checked to be one of our forms: `APIRouter(route_class=PageRoute)`."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            options["dependencies"] = [Depends(check_form), *(options.get("dependencies") or ())]
        super().__init__(path, endpoint, **options)
