"""The read half of the Hugging Face Hub's protocol, for `from_pretrained`, `snapshot_download` and `hf download`.

With `HF_ENDPOINT` at this service, revisions are versions (`v3`), aliases (`production`), commits, or `main`: what the
alias `production` points at, else the newest published version. A revision serves the whole pipeline.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Path, Query, Request, Response, Security
from sqlalchemy.orm import Session

from app.api.dependencies import NextPageLinkDep, SessionDep, StoreDep
from app.api.middleware.rate_limit import TooManyRequests
from app.api.routing import TransactionRoute
from app.auth.dependencies import Documented, Principal, authenticate, bearer
from app.checkpoints.delivery import deliver
from app.checkpoints.errors import FileUnreadable, RangeNotSatisfiable
from app.checkpoints.queries import MAIN, checkpoint_at
from app.checkpoints.service import ServedFile
from app.db.models import Model
from app.hub import listing, queries
from app.hub.errors import (
    EntryNotFound,
    RepoNotFound,
    RevisionNotFound,
    RevisionRetracted,
    ScopeMissing,
    TokenInvalid,
    TokenMissing,
)
from app.hub.queries import Revision
from app.problems import Forbidden, Unauthorized, documented
from emender.schemas.text import Text

MAX_PAGE = 1000  # entries of a tree


async def check_key(request: Request, _: Documented = None) -> Principal:
    """A key, sent as a Hub token; what is wrong with it is said in the Hub's words."""
    try:
        return await authenticate(request)
    except Unauthorized:
        if await bearer(request) is None:
            needed = "This endpoint needs a token: an API key with the scope 'read'."
            raise TokenMissing(needed, challenge=True) from None
        raise TokenInvalid(TokenInvalid.MESSAGE, challenge=True) from None


async def check_reader(principal: Annotated[Principal, Depends(check_key)]) -> None:
    """A key with the scope `read`."""
    try:
        principal.require("read")
    except Forbidden as error:
        raise ScopeMissing(error.detail) from None


EVERYWHERE = documented(RepoNotFound, TokenMissing, ScopeMissing, TooManyRequests)
router = APIRouter(tags=["hub"], responses=EVERYWHERE, route_class=TransactionRoute)
reading = APIRouter(dependencies=[Security(check_reader, scopes=["read"])], route_class=TransactionRoute)

Part = Annotated[Text, Path(max_length=96)]
Rev = Annotated[Text, Path(max_length=96, examples=["production", "v3"])]
AnyRev = Annotated[Text, Path(max_length=200, examples=["production", "refs/heads/production"])]
Recursive = Annotated[bool, Query(description="also what lies in folders")]
Expand = Annotated[bool, Query(description="name the last commit of each entry")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Cursor = Annotated[str | None, Query(max_length=1000, description="of the next page, from the header Link")]

RESOLVE = "/{namespace}/{repo}/resolve/{revision}/{path:path}"


@reading.head(RESOLVE, include_in_schema=False)
@reading.get(
    RESOLVE,
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The file; its ETag is its sha256"},
        206: {"description": "The range that was asked for"},
        302: {"description": "At the Location, a signed URL of the bucket that has the file"},
        304: {"description": "The file has the ETag in If-None-Match"},
        **documented(RevisionNotFound, EntryNotFound, RevisionRetracted, RangeNotSatisfiable, FileUnreadable),
    },
)
def resolve(
    session: SessionDep, store: StoreDep, request: Request, namespace: Part, repo: Part, revision: Rev, path: str
) -> Response:
    """Download a file of a revision."""
    revision, path = _split(f"{revision}/{path}")
    found = _revision(session, namespace=namespace, repo=repo, revision=revision)
    file = found.files.get(path)
    if file is None:
        raise EntryNotFound(f"There is no {path[:200]!r} in {found.repo} at {revision}.", commit=found.commit)
    served = ServedFile(file.path, file.sha256, file.size, commit=found.commit)
    return deliver(request, served, store=store, headers={"X-Repo-Commit": found.commit})


@reading.get("/api/models/{namespace}/{repo}", responses=documented(RevisionNotFound, RevisionRetracted))
def model_info(session: SessionDep, namespace: Part, repo: Part, blobs: bool = False) -> dict[str, Any]:
    """Describe the revision `main` and list its files."""
    return listing.info(_revision(session, namespace=namespace, repo=repo, revision=MAIN), blobs=blobs)


@reading.get("/api/models/{namespace}/{repo}/auth-check", status_code=204)
def auth_check(session: SessionDep, namespace: Part, repo: Part) -> None:
    """Whether the model is there and the key may read it."""
    _model(session, namespace=namespace, repo=repo)


@reading.get(
    "/api/models/{namespace}/{repo}/revision/{revision:path}",
    responses=documented(RevisionNotFound, RevisionRetracted),
)
def revision_info(
    session: SessionDep, namespace: Part, repo: Part, revision: AnyRev, blobs: bool = False
) -> dict[str, Any]:
    """Describe a revision and list its files."""
    name, rest = _split(revision)
    if rest:
        raise _no_revision(namespace, repo, revision)
    return listing.info(_revision(session, namespace=namespace, repo=repo, revision=name), blobs=blobs)


TREE = "/api/models/{namespace}/{repo}/tree/{revision}"


@reading.get(TREE, responses=documented(RevisionNotFound, RevisionRetracted))
@reading.get(TREE + "/{folder:path}", responses=documented(RevisionNotFound, RevisionRetracted, EntryNotFound))
def tree(
    session: SessionDep,
    link_next: NextPageLinkDep,
    namespace: Part,
    repo: Part,
    revision: Rev,
    folder: str = "",
    recursive: Recursive = False,
    expand: Expand = False,
    limit: Limit = MAX_PAGE,
    cursor: Cursor = None,
) -> list[dict[str, Any]]:
    """List the files and folders of a revision, or of a folder of it. The header `Link` leads to the next page."""
    revision, folder = _split(f"{revision}/{folder}")
    found = _revision(session, namespace=namespace, repo=repo, revision=revision)
    entries = listing.tree(found, folder=folder, recursive=recursive, expand=expand)
    if not entries:
        raise EntryNotFound(f"There is no folder {folder[:200]!r} in {found.repo}.", commit=found.commit)
    entries, following = listing.page(entries, limit=limit, cursor=cursor)
    link_next.set(following)
    return entries


@reading.post(
    "/api/models/{namespace}/{repo}/paths-info/{revision:path}",
    responses=documented(RevisionNotFound, RevisionRetracted),
)
def paths_info(
    session: SessionDep,
    namespace: Part,
    repo: Part,
    revision: AnyRev,
    paths: Annotated[list[str], Form(max_length=MAX_PAGE)],
    expand: Annotated[bool, Form()] = False,
) -> list[dict[str, Any]]:
    """Describe those of the given files and folders that a revision has."""
    name, rest = _split(revision)
    if rest:
        raise _no_revision(namespace, repo, revision)
    found = _revision(session, namespace=namespace, repo=repo, revision=name)
    wanted = {path.strip("/") for path in paths}
    return [entry for entry in listing.tree(found, recursive=True, expand=expand) if entry["path"] in wanted]


@reading.get("/api/models/{namespace}/{repo}/refs")
def refs(session: SessionDep, namespace: Part, repo: Part) -> dict[str, list[dict[str, str]]]:
    """List the revisions: aliases as branches, versions as tags."""
    model = _model(session, namespace=namespace, repo=repo)
    return {
        "branches": [listing.ref(reference, kind="heads") for reference in queries.branches(session, model=model)],
        "tags": [listing.ref(reference, kind="tags") for reference in queries.tags(session, model=model)],
        "converts": [],
    }


@router.get("/api/whoami-v2")
def whoami(principal: Annotated[Principal, Depends(check_key)]) -> dict[str, Any]:
    """Name the key that was sent, for `hf auth whoami` and `hf auth login`."""
    role = "read" if principal.scopes == {"read"} else "write"
    return {
        "type": "user",
        "name": principal.actor,
        "fullname": principal.name,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": {"displayName": principal.name, "role": role}},
    }


router.include_router(reading)


def _split(path: str) -> tuple[str, str]:
    """What follows `resolve/`, `tree/` or `revision/`, as revision and rest: `refs/heads/x` and `refs/tags/v1`, as
    /refs lists them, are `x` and `v1`."""
    parts = path.split("/", 3)
    if parts[0] == "refs" and len(parts) > 2 and parts[1] in ("heads", "tags"):
        return parts[2], "".join(parts[3:])
    revision, _, rest = path.partition("/")
    return revision, rest


def _no_revision(namespace: str, repo: str, revision: str) -> RevisionNotFound:
    return RevisionNotFound(f"{namespace}/{repo} has no version, alias or commit {revision[:200]!r}.")


def _model(session: Session, *, namespace: str, repo: str) -> Model:
    model = queries.find_model(session, namespace=namespace, repo=repo)
    if model is None:
        raise RepoNotFound(f"There is no model {namespace}/{repo}; GET /v1/models lists them.")
    return model


def _revision(session: Session, *, namespace: str, repo: str, revision: str) -> Revision:
    model = _model(session, namespace=namespace, repo=repo)
    checkpoint = checkpoint_at(session, model_id=model.id, revision=revision)
    if checkpoint is None:
        raise _no_revision(namespace, repo, revision)
    if checkpoint.state == "retracted":
        raise RevisionRetracted(f"{namespace}/{repo} at {revision} is v{checkpoint.number}, which was retracted.")
    if checkpoint.state != "published":
        raise RevisionNotFound(f"{namespace}/{repo} at {revision} is {checkpoint.state}, not published.")
    return queries.read_revision(session, model=model, checkpoint=checkpoint)
