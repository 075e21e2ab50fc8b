"""Apply edits, read checkpoints and their files, move aliases, trace files."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response

from app.api.dependencies import NextPageLinkDep, NumberedPageDep, PageDep, SessionDep, SettingsDep, StoreDep
from app.api.file_response import file_route, send_file
from app.api.routing import Route, accept_large_body
from app.api.work_routes import work_routes
from app.auth.dependencies import AdminPrincipal, ApplyPrincipal, ReadPrincipal
from app.checkpoints import aliases, difference, errors, service
from app.checkpoints import apply as apply_service
from app.checkpoints.aliases import Precondition
from app.models.errors import ModelNotFound, ModelNotReady
from app.problems import FileUnreadable, documented
from emender.schemas.checkpoints import (
    REVISION,
    VERSION,
    AliasName,
    AliasOut,
    AliasPeriod,
    AliasPut,
    ApplyCreate,
    ApplyPlan,
    CheckpointOut,
    CheckpointSummary,
    DateOrDateTime,
    DifferenceOut,
    FileProvenance,
    Retraction,
)
from emender.schemas.common import Page
from emender.schemas.text import Text

router = APIRouter(route_class=Route, tags=["checkpoints"])

ModelName = Annotated[Text, Path(max_length=96, examples=["emoji"])]
Version = Annotated[str, Path(pattern=VERSION, examples=["v3"])]
Revision = Annotated[
    str, Path(pattern=REVISION, description="a version, an alias, a commit, or `main`", examples=["v3", "production"])
]
Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
IfMatch = Annotated[str | None, Header(description="the alias's ETag; required to move or delete an existing alias")]
IfNoneMatch = Annotated[str | None, Header(description="`*`: only if the alias does not exist")]

NO_ALIAS = (ModelNotFound, errors.AliasNotFound)
NOT_SERVED = (ModelNotFound, errors.CheckpointNotFound, errors.CheckpointNotPublished, errors.CheckpointRetracted)


@router.post(
    "/models/{model}/apply",
    status_code=202,
    responses={
        200: {"model": ApplyPlan, "description": "A dry run: what would be applied"},
        202: {"headers": {"Location": {"description": "the checkpoint", "schema": {"type": "string"}}}},
        **documented(ModelNotFound, ModelNotReady, errors.StatisticsMissing),
    },
)
@accept_large_body
def apply(
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: ApplyPrincipal,
    model: ModelName,
    request: ApplyCreate,
    response: Response,
) -> CheckpointOut | ApplyPlan:
    """Write a set of edits into the base model and publish the result as a new checkpoint.

    Edits are written into the text encoder or, by UCE, into the U-Net or transformer: see `method`. The set is a list
    of ids (`edits`), "ready" (the newest ready edit of each source), or the edits of another checkpoint (`from`)
    without some (`remove`) and with others (`add`). Equal sets with equal settings give equal files.
    """
    if request.dry_run:
        response.status_code = 200
        return apply_service.plan(session, model_name=model, request=request, store=store, folder=settings.data_dir)
    checkpoint = apply_service.apply(
        session, model_name=model, request=request, store=store, folder=settings.data_dir, actor=principal.actor
    )
    response.headers["Location"] = f"/v1/models/{model}/checkpoints/{checkpoint.version}"
    return checkpoint


@router.get("/models/{model}/checkpoints", responses=documented(ModelNotFound))
def list_checkpoints(
    session: SessionDep, _: ReadPrincipal, model: ModelName, page: PageDep, link_next: NextPageLinkDep
) -> Page[CheckpointSummary]:
    """List a model's checkpoints, newest first."""
    return link_next(service.list_checkpoints(session, model_name=model, page=page))


@work_routes(
    router,
    "/models/{model}/checkpoints/{revision}",
    ModelNotFound,
    errors.CheckpointNotFound,
    find=service.find_checkpoint,
    follow="follow_checkpoint",
)
def read_checkpoint(session: SessionDep, model: ModelName, revision: Revision) -> CheckpointOut:
    """Read a checkpoint: its state, files, aliases, and edits with the residual of each."""
    return service.read_checkpoint(session, model_name=model, revision=revision)


@file_route(router, "/models/{model}/checkpoints/{revision}/files/{path:path}", *NOT_SERVED, errors.FileNotFound)
def read_file(
    session: SessionDep,
    store: StoreDep,
    _: ReadPrincipal,
    request: Request,
    model: ModelName,
    revision: Revision,
    path: str,
) -> Response:
    """Download a file of a published checkpoint, or one range of it. The file is verified before it is sent."""
    file, commit = service.find_file(session, model_name=model, revision=revision, path=path)
    return send_file(request, file, store=store, headers={"X-Repo-Commit": commit})


@router.get("/models/{model}/checkpoints/{revision}/difference", responses=documented(*NOT_SERVED, FileUnreadable))
def read_difference(
    session: SessionDep,
    store: StoreDep,
    _: ReadPrincipal,
    model: ModelName,
    revision: Revision,
    against: Annotated[str, Query(pattern=REVISION, description="a version, an alias, or `base`")] = "base",
) -> DifferenceOut:
    """Compare two checkpoints: edits added and removed, tensors that differ and by how much, files changed."""
    return difference.compare(session, store=store, model_name=model, revision=revision, against=against)


@router.post("/models/{model}/checkpoints/{version}/retract", status_code=200, responses=documented(*NOT_SERVED))
def retract(
    session: SessionDep, principal: AdminPrincipal, model: ModelName, version: Version, retraction: Retraction
) -> CheckpointOut:
    """Stop serving a checkpoint: its files answer 410, also through an alias that points at it. Its record stays."""
    return service.retract(session, model_name=model, version=version, reason=retraction.reason, actor=principal.actor)


@router.get("/models/{model}/aliases", tags=["aliases"], responses=documented(ModelNotFound))
def list_aliases(session: SessionDep, _: ReadPrincipal, model: ModelName) -> list[AliasOut]:
    """List a model's aliases by name."""
    return aliases.list_aliases(session, model_name=model)


@router.get("/models/{model}/aliases/{alias}", tags=["aliases"], responses=documented(*NO_ALIAS))
def read_alias(
    session: SessionDep, _: ReadPrincipal, model: ModelName, alias: Revision, response: Response
) -> AliasOut:
    """Read where an alias points. A move needs its ETag."""
    found, response.headers["ETag"] = aliases.read_alias(session, model_name=model, name=alias)
    return found


@router.get("/models/{model}/aliases/{alias}/history", tags=["aliases"], responses=documented(*NO_ALIAS))
def read_history(
    session: SessionDep,
    _: ReadPrincipal,
    model: ModelName,
    alias: Revision,
    page: NumberedPageDep,
    link_next: NextPageLinkDep,
    at: Annotated[
        DateOrDateTime | None,
        Query(description="only this time (with its offset) or this day (in UTC)", examples=["2026-11-24"]),
    ] = None,
) -> Page[AliasPeriod]:
    """Read where an alias pointed, since when and until when, newest first. Works for deleted aliases."""
    return link_next(aliases.read_history(session, model_name=model, name=alias, at=at, page=page))


@router.put(
    "/models/{model}/aliases/{alias}",
    tags=["aliases"],
    responses={
        201: {"model": AliasOut, "description": "Created"},
        **documented(ModelNotFound, errors.CheckpointNotPublished, errors.CheckpointRetracted),
        **documented(errors.AliasMoved, errors.PreconditionRequired),
    },
)
def move_alias(
    session: SessionDep,
    principal: ApplyPrincipal,
    model: ModelName,
    alias: AliasName,
    move: AliasPut,
    response: Response,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> AliasOut:
    """Point an alias at a checkpoint by compare-and-swap. A rollback is this call with an older version."""
    moved, response.headers["ETag"], created = aliases.move_alias(
        session,
        model_name=model,
        name=alias,
        version=move.version,
        precondition=Precondition(if_match, if_none_match),
        actor=principal.actor,
        reason=move.reason,
    )
    response.status_code = 201 if created else 200
    return moved


@router.delete(
    "/models/{model}/aliases/{alias}",
    tags=["aliases"],
    status_code=204,
    responses=documented(*NO_ALIAS, errors.AliasMoved, errors.PreconditionRequired),
)
def delete_alias(
    session: SessionDep, principal: ApplyPrincipal, model: ModelName, alias: Revision, if_match: IfMatch = None
) -> None:
    """Delete an alias. Checkpoints stay."""
    precondition = Precondition(if_match)
    aliases.delete_alias(session, model_name=model, name=alias, precondition=precondition, actor=principal.actor)


@router.get("/files/{sha256}", responses=documented(errors.FileNotFound))
def trace_file(session: SessionDep, _: ReadPrincipal, sha256: Sha256) -> FileProvenance:
    """Find the checkpoints, and so the edits, that a file came from."""
    return service.trace_file(session, sha256=sha256)
