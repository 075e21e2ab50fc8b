"""What the handlers of pages share: the form, rendered pages, redirects and undone actions."""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

from fastapi import Depends, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from app.admin.access import COOKIE, form_token
from app.admin.forms import EMPTY_FORM, FormData, parse_form
from app.admin.templates import TEMPLATES
from app.api.dependencies import SessionDep
from app.api.middleware.security_headers import content_policy
from app.auth.service import Principal
from app.problems import Problem

Result = TypeVar("Result")

PLAIN = ("style-src 'self'", "img-src 'self'", "form-action 'self'")
POLICY = content_policy(*PLAIN)
LIVE_POLICY = content_policy(*PLAIN, "script-src 'self'", "connect-src 'self'")


class View:
    """The request of a page, its form, which is empty for GET, and the database session."""

    def __init__(self, request: Request, form: FormData) -> None:
        self.request, self.form = request, form

    @property
    def session(self) -> SessionDep:
        session: SessionDep = self.request.state.session  # of the endpoint's transaction
        return session

    def render(self, template: str, *, status: int = HTTPStatus.OK, live: bool = False, **context: Any) -> Response:
        return render(self.request, template, status=status, live=live, form=self.form, **context)

    def redirect(self, path: str) -> RedirectResponse:
        """Redirect to a page after a form."""
        return redirect(self.request, path)

    def submit(self, act: Callable[[], str], show: Callable[[], Response]) -> Response:
        """Redirect to the path that `act` returns. If it raises a problem, undo it and `show` the form with it."""
        result = self.savepoint(act)
        if isinstance(result, str):
            return self.redirect(result)
        self.form = self.form.with_problem(result)
        return show()

    def savepoint(self, act: Callable[[], Result]) -> Result | Problem:
        """Return the result of `act`. If it raises a problem, undo it and return the problem."""
        try:
            with self.session.begin_nested():
                return act()
        except Problem as problem:
            return problem


async def get_view(request: Request) -> View:
    return View(request, await parse_form(request) if request.method == "POST" else EMPTY_FORM)


ViewDep = Annotated[View, Depends(get_view)]


def render(
    request: Request,
    template: str,
    *,
    status: int = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    form: FormData = EMPTY_FORM,
    live: bool = False,
    **context: object,
) -> HTMLResponse:
    """Render a template, with the status of its form's problem if it has one.

    `token` is that of the session whose forms it contains; default: the request's. A `live` page can run htmx.
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


def redirect(request: Request, path: str) -> RedirectResponse:
    return RedirectResponse(request.scope["root_path"] + path, status_code=HTTPStatus.SEE_OTHER)


def respond(request: Request, problem: Problem) -> Response:
    """Return the page of a problem. `Unauthorized` redirects to the sign-in page, which leads back."""
    if problem.status == HTTPStatus.UNAUTHORIZED and "HX-Request" in request.headers:
        return Response(status_code=problem.status, headers={"HX-Refresh": "true"})  # reload the whole page
    if problem.status == HTTPStatus.UNAUTHORIZED:
        path = request.url.path.removeprefix(request.scope["root_path"]).lstrip("/")
        if request.method != "GET" or not path:
            return redirect(request, "/sign-in")
        path += f"?{request.url.query}" if request.url.query else ""
        return redirect(request, f"/sign-in?{urlencode({'to': path})}")
    return render(request, "problem.html", status=problem.status, headers=problem.headers, problem=problem)
