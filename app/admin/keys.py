"""API keys: who has one, a new one, and the end of one."""

from uuid import UUID

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.admin.access import Admin, PageRoute
from app.admin.forms import Filled, FormDep, Reading, asked, attempt, checked, document, utc, word
from app.admin.rendering import NOTHING, page, see
from app.api.dependencies import PageDep, SessionDep
from app.auth import service
from app.problems import Problem
from emender.schemas.keys import ApiKeyCreate, ApiKeyOut

router = APIRouter(route_class=PageRoute)

KEY: dict[str, Reading] = {"/name": word, "/scopes": checked, "/expires_at": utc}


@router.get("/keys")
def list_keys(request: Request, session: SessionDep, _: Admin, listed: PageDep) -> Response:
    return _keys_page(request, session, listed, NOTHING)


@router.post("/keys")
def create_key(request: Request, session: SessionDep, principal: Admin, listed: PageDep, form: FormDep) -> Response:
    """The token is in this answer and nowhere else: there is no page to be sent to that could show it."""

    def create() -> tuple[ApiKeyOut, str]:
        key = asked(ApiKeyCreate, document(form, KEY))
        return service.create_key(
            session, name=key.name, scopes=key.scopes, actor=principal.actor, expires_at=key.expires_at
        )

    created = attempt(session, create)
    if isinstance(created, Problem):
        return _keys_page(request, session, listed, form.refused(created))
    key, token = created
    return page(request, "key_created.html", status=201, key=key, secret=token)


@router.get("/keys/{key_id}/revoke")
def show_revocation(request: Request, session: SessionDep, principal: Admin, key_id: UUID) -> Response:
    key = service.get_key(session, key_id=key_id)
    return page(request, "revoke.html", key=key, own=principal.actor == f"key:{key.prefix}")


@router.post("/keys/{key_id}/revoke")
def revoke_key(request: Request, session: SessionDep, principal: Admin, key_id: UUID) -> Response:
    service.revoke_key(session, key_id=key_id, actor=principal.actor)
    return see(request, "/keys")


def _keys_page(request: Request, session: SessionDep, listed: PageDep, form: Filled) -> Response:
    return page(request, "keys.html", form=form, keys=service.list_keys(session, page=listed), scopes=service.SCOPES)
