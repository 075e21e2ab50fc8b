"""Sign in and out."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.security import HTTPAuthorizationCredentials
from starlette.responses import Response

from app.admin import access
from app.admin.view import redirect, render
from app.api.dependencies import SessionDep
from app.auth import browser_sessions
from app.auth.dependencies import RequireScope
from app.problems import Forbidden, TooManyRequests, Unauthorized

router = APIRouter(route_class=access.PageRoute)

authenticate = RequireScope("read")


@router.get("/sign-in")
def show_sign_in(request: Request, to: Annotated[str, Query(max_length=2_000)] = "") -> Response:
    """Show the sign-in form. `to` is the page, below the root, that it leads to."""
    token = access.anonymous_token(request)
    response = render(request, "sign_in.html", token=token, to=to, error=None)
    access.set_cookie(request, response, token)
    return response


@router.post("/sign-in")
def sign_in(
    request: Request,
    session: SessionDep,
    key: Annotated[str, Form(max_length=200)] = "",
    to: Annotated[str, Form(max_length=2_000)] = "",
) -> Response:
    """Start a session with a new token. The rate limits of the API apply."""
    try:
        principal = authenticate(request, HTTPAuthorizationCredentials(scheme="Bearer", credentials=key.strip()))
    except (Unauthorized, Forbidden, TooManyRequests) as error:
        return render(request, "sign_in.html", status=error.status, headers=error.headers, to=to, error=error.detail)
    response = redirect(request, f"/{to.lstrip('/')}")
    access.set_cookie(request, response, browser_sessions.begin_session(session, key_id=principal.key_id))
    return response


@router.post("/sign-out")
def sign_out(request: Request, session: SessionDep) -> Response:
    browser_sessions.end_session(session, token=request.cookies[access.COOKIE])
    response = redirect(request, "/sign-in")
    response.delete_cookie(access.COOKIE, path=request.scope["root_path"])
    return response
