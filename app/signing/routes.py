"""Give the public keys that versions are verified with."""

from fastapi import APIRouter, Response

from app.api.dependencies import SessionDep
from app.api.routing import Route
from app.auth.dependencies import ReadPrincipal
from app.problems import documented
from app.signing import service
from emender.schemas.signing import SigningKeyOut

router = APIRouter(tags=["signing keys"], route_class=Route)
PEM = "application/x-pem-file"


@router.get(
    "/signing-key",
    response_class=Response,
    responses={
        200: {"content": {PEM: {"schema": {"type": "string"}}}, "description": "The public key; PEM"},
        **documented(service.NothingSigned),
    },
)
def read_key(session: SessionDep, _: ReadPrincipal) -> Response:
    """Download the public key that versions are signed with now, for `emender verify --key` and `pull.py --key`.

    Whoever could change a version could change this answer: compare the key, once, with what `emender signing-key show`
    prints beside its file.
    """
    return Response(service.current_key(session).public_key, media_type=PEM)


@router.get("/signing-keys")
def list_keys(session: SessionDep, _: ReadPrincipal) -> list[SigningKeyOut]:
    """List every key that versions were ever signed with, the one used last first."""
    return service.list_keys(session)
