"""Apply edits, list and read checkpoints, move aliases, trace files."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.dependencies import NextPageLinkDep, NumberedPageDep, PageDep, SessionDep, SettingsDep, StoreDep
from app.api.routing import Route
from app.api.waiting import EVENTS, LastEventId, WaitDep, WatchDep
from app.auth.dependencies import AdminPrincipal, ApplyPrincipal, ReadPrincipal
from app.checkpoints import aliases, service
from app.checkpoints import apply as applying
from app.checkpoints.aliases import Expectation
from app.checkpoints.delivery import deliver
from app.checkpoints.difference import difference
from app.checkpoints.errors import (
    AliasMoved,
    AliasNotFound,
    CheckpointNotFound,
    CheckpointNotPublished,
    CheckpointRetracted,
    FileNotFound,
    FileUnreadable,
    PreconditionRequired,
    RangeNotSatisfiable,
    StatisticsMissing,
)
from app.models.errors import ModelNotFound, ModelNotReady
from app.problems import documented
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
IfMatch = Annotated[str | None, Header(description="the alias's ETag; needed to move or delete one that exists")]
IfNoneMatch = Annotated[str | None, Header(description="`*`: only if there is no such alias yet")]

UNSERVED = (CheckpointNotFound, CheckpointNotPublished, CheckpointRetracted)


@router.post(
    "/models/{model}/apply",
    status_code=202,
    responses={
        200: {"model": ApplyPlan, "description": "A dry run: what would be applied"},
        202: {"headers": {"Location": {"description": "the checkpoint", "schema": {"type": "string"}}}},
        **documented(ModelNotFound, ModelNotReady, StatisticsMissing),
    },
)
def apply(
    session: SessionDep,
    settings: SettingsDep,
    store: StoreDep,
    principal: ApplyPrincipal,
    model: ModelName,
    request: ApplyCreate,
    response: Response,
) -> CheckpointOut | ApplyPlan:
    """Write a set of edits into the base model and publish it as the next version: into its text encoder or, by the
    method `cross_attention`, into its U-Net.

    The set is named whole (`edits`), as "ready" (of each source the newest edit that is ready), or as a version `from`
    which some are removed and to which others are added. Equal sets with equal settings give equal files.
    """
    if request.dry_run:
        response.status_code = 200
        return applying.plan(session, model_name=model, request=request, store=store, folder=settings.data_dir)
    checkpoint = applying.apply(
        session, model_name=model, request=request, store=store, folder=settings.data_dir, actor=principal.actor
    )
    response.headers["Location"] = f"/v1/models/{model}/checkpoints/{checkpoint.version}"
    return checkpoint


@router.get("/models/{model}/checkpoints", responses=documented(ModelNotFound))
def list_checkpoints(
    session: SessionDep, _: ReadPrincipal, model: ModelName, page: PageDep, link_next: NextPageLinkDep
) -> Page[CheckpointSummary]:
    """List a model's versions, newest first."""
    return link_next(service.list_checkpoints(session, model_name=model, page=page))


@router.get("/models/{model}/checkpoints/{revision}", responses=documented(ModelNotFound, CheckpointNotFound))
async def read_checkpoint(
    watch: WatchDep, _: ReadPrincipal, model: ModelName, revision: Revision, wait: WaitDep
) -> CheckpointOut:
    """Read a version: its state, edits with the residual that each has left, files, aliases."""
    status = partial(service.checkpoint_status, model_name=model, revision=revision)
    read = partial(service.read_checkpoint, model_name=model, revision=revision)
    return await watch.settled(status, read, seconds=wait)


@router.get(
    "/models/{model}/checkpoints/{revision}/events",
    response_class=StreamingResponse,
    responses={**EVENTS, **documented(ModelNotFound, CheckpointNotFound)},
)
async def follow_checkpoint(
    watch: WatchDep, _: ReadPrincipal, model: ModelName, revision: Revision, last_event_id: LastEventId = None
) -> Response:
    """Follow how a version is built. Each event tells its state and progress whole; `Last-Event-ID` resumes."""
    status = partial(service.checkpoint_status, model_name=model, revision=revision)
    return await watch.events(status, known=last_event_id)


FILE = "/models/{model}/checkpoints/{revision}/files/{path:path}"


@router.head(FILE, include_in_schema=False)
@router.get(
    FILE,
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The file; its ETag is its sha256"},
        206: {"description": "The range that was asked for"},
        302: {"description": "At the Location, a signed URL of the bucket that has the file"},
        304: {"description": "The file has the ETag in If-None-Match"},
        **documented(ModelNotFound, *UNSERVED, FileNotFound, RangeNotSatisfiable, FileUnreadable),
    },
)
def read_file(
    session: SessionDep,
    store: StoreDep,
    _: ReadPrincipal,
    request: Request,
    model: ModelName,
    revision: Revision,
    path: str,
) -> Response:
    """Download a file of a published version, whole or one range of it, checked against its sha256 first."""
    file = service.find_file(session, model_name=model, revision=revision, path=path)
    return deliver(request, file, store=store, headers={"X-Repo-Commit": file.commit})


@router.get(
    "/models/{model}/checkpoints/{revision}/difference", responses=documented(ModelNotFound, *UNSERVED, FileUnreadable)
)
def read_difference(
    session: SessionDep,
    store: StoreDep,
    _: ReadPrincipal,
    model: ModelName,
    revision: Revision,
    against: Annotated[str, Query(pattern=REVISION, description="a version, an alias, or `base`")] = "base",
) -> DifferenceOut:
    """Compare two versions: edits added and removed, every tensor that differs and by how much, files changed."""
    return difference(session, store=store, model_name=model, revision=revision, against=against)


@router.post(
    "/models/{model}/checkpoints/{version}/retract", status_code=200, responses=documented(ModelNotFound, *UNSERVED)
)
def retract(
    session: SessionDep, principal: AdminPrincipal, model: ModelName, version: Version, retraction: Retraction
) -> CheckpointOut:
    """Stop serving a version: its files answer 410, also through an alias that points at it. The record stays."""
    return service.retract(session, model_name=model, version=version, reason=retraction.reason, actor=principal.actor)


@router.get("/models/{model}/aliases", tags=["aliases"], responses=documented(ModelNotFound))
def list_aliases(session: SessionDep, _: ReadPrincipal, model: ModelName) -> list[AliasOut]:
    """List a model's aliases by name."""
    return aliases.list_aliases(session, model=service.find_model(session, name=model))


@router.get("/models/{model}/aliases/{alias}", tags=["aliases"], responses=documented(ModelNotFound, AliasNotFound))
def read_alias(
    session: SessionDep, _: ReadPrincipal, model: ModelName, alias: Revision, response: Response
) -> AliasOut:
    """Read where an alias points; its ETag is what a move needs."""
    found, response.headers["ETag"] = aliases.read_alias(
        session, model=service.find_model(session, name=model), name=alias
    )
    return found


@router.get(
    "/models/{model}/aliases/{alias}/history", tags=["aliases"], responses=documented(ModelNotFound, AliasNotFound)
)
def read_history(
    session: SessionDep,
    _: ReadPrincipal,
    model: ModelName,
    alias: Revision,
    page: NumberedPageDep,
    link_next: NextPageLinkDep,
    at: Annotated[
        DateOrDateTime | None,
        Query(description="where it pointed then: a moment with its offset, or a day in UTC", examples=["2026-11-24"]),
    ] = None,
) -> Page[AliasPeriod]:
    """Read where an alias pointed, since when and until when, newest first; also of one that was deleted."""
    found = service.find_model(session, name=model)
    return link_next(aliases.read_history(session, model=found, name=alias, at=at, page=page))


@router.put(
    "/models/{model}/aliases/{alias}",
    tags=["aliases"],
    responses={
        201: {"model": AliasOut, "description": "Created"},
        **documented(ModelNotFound, CheckpointNotPublished, CheckpointRetracted, AliasMoved, PreconditionRequired),
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
    """Point an alias at a version by compare-and-swap; a rollback is this call with an older version."""
    moved, response.headers["ETag"], created = aliases.move_alias(
        session,
        model=service.find_model(session, name=model),
        name=alias,
        version=move.version,
        expected=Expectation(if_match, if_none_match),
        actor=principal.actor,
        reason=move.reason,
    )
    response.status_code = 201 if created else 200
    return moved


@router.delete(
    "/models/{model}/aliases/{alias}",
    tags=["aliases"],
    status_code=204,
    responses=documented(ModelNotFound, AliasNotFound, AliasMoved, PreconditionRequired),
)
def delete_alias(
    session: SessionDep, principal: ApplyPrincipal, model: ModelName, alias: Revision, if_match: IfMatch = None
) -> None:
    """Delete an alias; the versions stay."""
    aliases.delete_alias(
        session,
        model=service.find_model(session, name=model),
        name=alias,
        expected=Expectation(if_match),
        actor=principal.actor,
    )


@router.get("/files/{sha256}", responses=documented(FileNotFound))
def trace_file(session: SessionDep, _: ReadPrincipal, sha256: Sha256) -> FileProvenance:
    """Find which checkpoints, and so which edits, a file in the wild came from."""
    return service.trace_file(session, sha256=sha256)
