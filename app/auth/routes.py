"""Create, list and revoke API keys."""

from uuid import UUID

from fastapi import APIRouter, Request, Response

from app.api.dependencies import NextPageLinkDep, PageDep, SessionDep
from app.api.idempotency import store_instead
from app.api.routing import Route
from app.auth import service
from app.auth.dependencies import AdminPrincipal
from app.problems import documented
from emender.schemas.common import Page
from emender.schemas.keys import ApiKeyCreate, ApiKeyCreated, ApiKeyOut

router = APIRouter(prefix="/keys", tags=["keys"], route_class=Route)


@router.post("", status_code=201)
def create_key(
    session: SessionDep, principal: AdminPrincipal, key: ApiKeyCreate, request: Request, response: Response
) -> ApiKeyCreated:
    """Create a key. Its token is in this answer and nowhere else."""
    created, token = service.create_key(
        session, name=key.name, scopes=key.scopes, actor=principal.actor, expires_at=key.expires_at
    )
    response.headers["Cache-Control"] = "no-store"
    store_instead(request, ApiKeyCreated(**created.model_dump(), token=None))
    return ApiKeyCreated(**created.model_dump(), token=token)


@router.get("")
def list_keys(session: SessionDep, _: AdminPrincipal, page: PageDep, link_next: NextPageLinkDep) -> Page[ApiKeyOut]:
    """List keys, newest first, the revoked ones too."""
    return link_next(service.list_keys(session, page=page))


@router.delete("/{key_id}", status_code=204, responses=documented(service.ApiKeyNotFound))
def revoke_key(session: SessionDep, principal: AdminPrincipal, key_id: UUID) -> None:
    """Revoke a key. It stays listed, since the audit log names it."""
    service.revoke_key(session, key_id=key_id, actor=principal.actor)
