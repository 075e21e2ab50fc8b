"""Pages out of templates. Everything that a client once gave is escaped; the one script is htmx, on pages that follow
what is under way."""

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
from app.admin import plots
from app.admin.access import COOKIE, form_token
from app.admin.forms import Filled
from app.api.middleware.security_headers import policy
from app.auth.dependencies import Principal
from app.jobs import kinds
from app.problems import Problem

NOTHING = Filled()
PLAIN = ("style-src 'self'", "img-src 'self'", "form-action 'self'")
POLICY = policy(*PLAIN)
LIVE_POLICY = policy(*PLAIN, "script-src 'self'", "connect-src 'self'")


def page(
    request: Request,
    template: str,
    *,
    status: int = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    form: Filled = NOTHING,
    live: bool = False,
    **context: object,
) -> HTMLResponse:
    """The template as an answer, with the status of what is wrong with its form.

    `token` is that of the session whose forms it holds; default: the request's. A `live` page may run htmx.
    """
    token = token or request.cookies.get(COOKIE)
    principal: Principal | None = getattr(request.state, "principal", None)
    content = TEMPLATES.get_template(template).render(
        root=request.scope["root_path"],
        principal=principal,
        may=principal.may if principal else None,
        form=form,
        live=live,
        form_token=form_token(token) if token else None,
        query=request.query_params,
        next_query=lambda cursor: request.url.include_query_params(cursor=cursor).query,
        **context,
    )
    own = {"Content-Security-Policy": LIVE_POLICY if live else POLICY, "Cache-Control": "no-store"}
    status = form.problem.status if form.problem else status
    return HTMLResponse(content, status_code=int(status), headers={**(headers or {}), **own})


def see(request: Request, path: str) -> RedirectResponse:
    """Where the browser is to go on after a form."""
    return RedirectResponse(request.scope["root_path"] + path, status_code=HTTPStatus.SEE_OTHER)


def respond(request: Request, problem: Problem) -> Response:
    """A problem as a page; who has to sign in is sent to do so, and from there to where they were going."""
    root = request.scope["root_path"]
    if problem.status == HTTPStatus.UNAUTHORIZED and "HX-Request" in request.headers:
        return Response(status_code=problem.status, headers={"HX-Refresh": "true"})  # the whole page is to be asked for
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
TEMPLATES.tests["png"] = lambda name: name.endswith(".png")
TEMPLATES.globals.update(kinds=kinds, plots=plots, version=editing.__version__)
