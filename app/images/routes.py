"""Upload and read reference images."""

from typing import Annotated

from fastapi import APIRouter, Depends, File, Path, Request, Response, UploadFile

from app.api.dependencies import SessionDep, StoreDep
from app.api.routing import Route, accept_large_body
from app.auth.dependencies import EditPrincipal, ReadPrincipal
from app.images import service
from app.images.errors import ImageNotFound
from app.images.reencode import Picture, reencode_upload
from app.problems import ContentTooLarge, InsufficientStorage, UnsupportedMedia, documented
from emender.schemas.images import ImageOut

router = APIRouter(prefix="/images", tags=["images"], route_class=Route)

ImageId = Annotated[str, Path(pattern="^sha256:[0-9a-f]{64}$", examples=["sha256:" + "0" * 64])]


async def reencode_file(
    request: Request,
    _: EditPrincipal,
    file: Annotated[UploadFile, File(description="PNG, JPEG or WebP of one frame; the content decides")],
) -> Picture:
    state = request.app.state
    return await reencode_upload(file.file, settings=state.settings, decoders=state.decoders)


@router.post("", status_code=201, responses=documented(ContentTooLarge, UnsupportedMedia, InsufficientStorage))
@accept_large_body
def add_image(
    session: SessionDep,
    store: StoreDep,
    principal: EditPrincipal,
    picture: Annotated[Picture, Depends(reencode_file)],
    response: Response,
) -> ImageOut:
    """Upload a reference image. It is stored as a PNG without metadata; equal images have the same id."""
    image = service.add_image(session, picture=picture, store=store, actor=principal.actor)
    response.headers["Location"] = f"/v1/images/{image.id}"
    return image


@router.get("/{image_id}", responses=documented(ImageNotFound))
def get_image(session: SessionDep, _: ReadPrincipal, image_id: ImageId) -> ImageOut:
    """Return an image's size and origin."""
    return service.get_image(session, image_id=image_id)


@router.get(
    "/{image_id}/content",
    response_class=Response,
    responses={
        200: {"description": "The PNG", "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
        **documented(ImageNotFound),
    },
)
def get_image_content(session: SessionDep, store: StoreDep, _: ReadPrincipal, image_id: ImageId) -> Response:
    """Return the stored image."""
    content = service.read_image(session, image_id=image_id, store=store)
    headers = {
        "ETag": f'"{image_id.removeprefix("sha256:")}"',
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(content, media_type="image/png", headers=headers)
