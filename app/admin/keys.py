"""API keys: create and revoke them."""

from uuid import UUID

from fastapi import APIRouter
from starlette.responses import Response

from app.admin.access import Admin, PageRoute
from app.admin.forms import checked, utc
from app.admin.view import ViewDep
from app.api.dependencies import PageDep
from app.auth import service
from app.problems import Problem
from emender.schemas.keys import ApiKeyCreate, ApiKeyOut

router = APIRouter(route_class=PageRoute)


@router.get("/keys")
def list_keys(view: ViewDep, _: Admin, page: PageDep) -> Response:
    return view.render("keys.html", keys=service.list_keys(view.session, page=page), scopes=service.SCOPES)


@router.post("/keys")
def create_key(view: ViewDep, admin: Admin, page: PageDep) -> Response:
    """Create a key. Only this response shows its token, so there is no redirect."""

    def create() -> tuple[ApiKeyOut, str]:
        key = view.form.parse(ApiKeyCreate, {"/scopes": checked, "/expires_at": utc})
        return service.create_key(
            view.session, name=key.name, scopes=key.scopes, actor=admin.actor, expires_at=key.expires_at
        )

    created = view.savepoint(create)
    if isinstance(created, Problem):
        view.form = view.form.with_problem(created)
        return list_keys(view, admin, page)
    key, token = created
    return view.render("key_created.html", status=201, key=key, secret=token)


@router.get("/keys/{key_id}/revoke")
def show_revocation(view: ViewDep, admin: Admin, key_id: UUID) -> Response:
    key = service.get_key(view.session, key_id=key_id)
    return view.render("revoke.html", key=key, own=admin.actor == f"key:{key.prefix}")


@router.post("/keys/{key_id}/revoke")
def revoke_key(view: ViewDep, admin: Admin, key_id: UUID) -> Response:
    service.revoke_key(view.session, key_id=key_id, actor=admin.actor)
    return view.redirect("/keys")
