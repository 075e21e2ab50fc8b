"""Signing in and out."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from starlette.responses import Response

from app.admin import access
from app.admin.rendering import page, see
from app.api.dependencies import SessionDep
from app.api.middleware.rate_limit import RateLimitsDep, TooManyRequests
from app.auth import browser_sessions
from app.auth.dependencies import Principal, find_keys
from app.problems import Forbidden, Problem, Unauthorized

router = APIRouter(route_class=access.PageRoute)

Wanted = Annotated[str, Query(max_length=2_000, description="the page that was asked for, below the root")]


@router.get("/sign-in")
def show_sign_in(request: Request, to: Wanted = "") -> Response:
    token = access.visitor(request)
    response = page(request, "sign_in.html", token=token, to=to, error=None)
    access.set_cookie(request, response, token)
    return response


@router.post("/sign-in")
def sign_in(
    request: Request,
    session: SessionDep,
    limits: RateLimitsDep,
    key: Annotated[str, Form(max_length=200)] = "",
    to: Annotated[str, Form(max_length=2_000)] = "",
) -> Response:
    """Begin a session under a new token. Wrong keys count against their address, as in the API."""
    try:
        (found,) = find_keys(session, limits, [(request, key.strip())])
        if isinstance(found, Problem):
            raise found
        Principal.of(found).require("read")
    except (Unauthorized, Forbidden, TooManyRequests) as error:
        return page(request, "sign_in.html", status=error.status, headers=error.headers, to=to, error=error.detail)
    response = see(request, f"/{to.lstrip('/')}")
    access.set_cookie(request, response, browser_sessions.begin(session, key_id=found.id))
    return response


@router.post("/sign-out")
def sign_out(request: Request, session: SessionDep) -> Response:
    browser_sessions.end(session, token=request.cookies[access.COOKIE])
    response = see(request, "/sign-in")
    response.delete_cookie(access.COOKIE, path=request.scope["root_path"])
    return response
