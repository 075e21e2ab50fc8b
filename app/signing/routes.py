"""Serve the public keys that checkpoints are verified with."""

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
        **documented(service.NoSigningKey),
    },
)
def read_key(session: SessionDep, _: ReadPrincipal) -> Response:
    """Download the public key that checkpoints are signed with now: PEM, for `emender verify --key`.

    Who can change a checkpoint can change this response too. Compare the key once with what `emender signing-key show`
    prints on the worker's machine.
    """
    return Response(service.get_current_key(session).public_key, media_type=PEM)


@router.get("/signing-keys")
def list_keys(session: SessionDep, _: ReadPrincipal) -> list[SigningKeyOut]:
    """List every key that checkpoints were signed with, the one used last first."""
    return service.list_keys(session)
