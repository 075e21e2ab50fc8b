"""Pages out of templates. Everything that a client once gave is escaped, and no page runs a script."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlencode

from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, RedirectResponse, Response

import editing
from app.pages import plots
from app.pages.access import COOKIE, form_token
from app.problems import Problem
from app.security_headers import policy

POLICY = policy("style-src 'self'", "img-src 'self'", "form-action 'self'")


def page(
    request: Request,
    template: str,
    *,
    status: int = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    **context: object,
) -> HTMLResponse:
    """The template as an answer. `token` is that of the session whose forms it holds; default: the request's."""
    token = token or request.cookies.get(COOKIE)
    content = TEMPLATES.get_template(template).render(
        root=request.scope["root_path"],
        principal=getattr(request.state, "principal", None),
        form_token=form_token(token) if token else None,
        query=request.query_params,
        next_query=lambda cursor: request.url.include_query_params(cursor=cursor).query,
        **context,
    )
    own = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(content, status_code=int(status), headers={**(headers or {}), **own})


def respond(request: Request, problem: Problem) -> Response:
    """A problem as a page; who has to sign in is sent to do so, and from there to where they were going."""
    root = request.scope["root_path"]
    if problem.status == HTTPStatus.UNAUTHORIZED:
        wanted = request.url.path.removeprefix(root).lstrip("/")
        if request.method == "GET" and wanted:
            wanted += f"?{request.url.query}" if request.url.query else ""
            return RedirectResponse(f"{root}/sign-in?{urlencode({'to': wanted})}", status_code=HTTPStatus.SEE_OTHER)
        return RedirectResponse(f"{root}/sign-in", status_code=HTTPStatus.SEE_OTHER)
    return page(request, "problem.html", status=problem.status, headers=problem.headers, problem=problem)


def moment(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def age(time: datetime) -> str:
    """How long ago, in the unit that fits."""
    seconds = max(0, round((datetime.now(UTC) - time) / timedelta(seconds=1)))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def confidence(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def size(count: int) -> str:
    """Bytes in the unit that fits."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters.update(moment=moment, age=age, figure=figure, confidence=confidence, size=size, pretty=pretty)
TEMPLATES.globals.update(plots=plots, version=editing.__version__)
