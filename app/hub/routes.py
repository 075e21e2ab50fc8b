"""The read protocol of the Hugging Face Hub, for `from_pretrained`, `snapshot_download` and `hf download`.

Set `HF_ENDPOINT` to this service. Revisions are versions (`v3`), aliases (`production`), commits, or `main`, which is
the alias `production` or, without it, the newest published checkpoint. A revision serves the whole pipeline.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Path, Query, Request, Response, Security
from sqlalchemy.orm import Session

from app.api.dependencies import NextPageLinkDep, SessionDep, StoreDep
from app.api.file_response import file_route, send_file
from app.api.routing import TransactionRoute
from app.auth.dependencies import Credentials, RequireScope
from app.auth.service import Principal
from app.checkpoints.errors import CheckpointNotFound, CheckpointNotPublished, CheckpointRetracted
from app.checkpoints.files import Revision, list_revisions, read_revision
from app.checkpoints.queries import MAIN
from app.db.models import Model
from app.hub import errors, listing
from app.models.queries import find_model
from app.problems import TooManyRequests, Unauthorized, documented
from emender.schemas.text import Text

MAX_PAGE = 1000  # entries of a tree per response


authenticate = RequireScope(None)


def check_key(request: Request, credentials: Credentials) -> Principal:
    """Authenticate by an API key that was sent as a Hub token. Raises the Hub's problems."""
    try:
        return authenticate(request, credentials)
    except Unauthorized:
        if credentials is None:
            needed = "This endpoint needs a token: an API key with the scope 'read'."
            raise errors.TokenMissing(needed, challenge=True) from None
        raise errors.TokenInvalid(errors.TokenInvalid.MESSAGE, challenge=True) from None


async def check_reader(principal: Annotated[Principal, Depends(check_key)]) -> None:
    """Require the scope `read`."""
    if not principal.may("read"):
        raise errors.ScopeMissing(f"This needs the scope 'read'; the key has {', '.join(sorted(principal.scopes))}.")


EVERYWHERE = documented(errors.RepoNotFound, errors.TokenMissing, errors.ScopeMissing, TooManyRequests)
NO_REVISION = documented(errors.RevisionNotFound, errors.RevisionRetracted)
router = APIRouter(tags=["hub"], responses=EVERYWHERE, route_class=TransactionRoute)
read_router = APIRouter(dependencies=[Security(check_reader, scopes=["read"])], route_class=TransactionRoute)

Part = Annotated[Text, Path(max_length=96)]
Rev = Annotated[Text, Path(max_length=96, examples=["production", "v3"])]
AnyRev = Annotated[Text, Path(max_length=200, examples=["production", "refs/heads/production"])]
Recursive = Annotated[bool, Query(description="include the content of folders")]
Expand = Annotated[bool, Query(description="name the last commit of each entry")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Cursor = Annotated[str | None, Query(max_length=1000, description="from the Link header of the previous page")]


@file_route(
    read_router,
    "/{namespace}/{repo}/resolve/{revision}/{path:path}",
    errors.RevisionNotFound,
    errors.EntryNotFound,
    errors.RevisionRetracted,
)
def resolve(
    session: SessionDep, store: StoreDep, request: Request, namespace: Part, repo: Part, revision: Rev, path: str
) -> Response:
    """Download a file of a revision."""
    name, path = _split(f"{revision}/{path}")
    found = _read_revision(session, namespace, repo, name)
    file = found.files.get(path)
    if file is None:
        raise errors.EntryNotFound(f"There is no {path[:200]!r} in {namespace}/{repo} at {name}.", commit=found.commit)
    return send_file(request, file, store=store, headers={"X-Repo-Commit": found.commit})


@read_router.get("/api/models/{namespace}/{repo}", responses=NO_REVISION)
def model_info(session: SessionDep, namespace: Part, repo: Part, blobs: bool = False) -> dict[str, Any]:
    """Describe the revision `main` and list its files."""
    found = _read_revision(session, namespace, repo, MAIN)
    return listing.describe_model(f"{namespace}/{repo}", found, blobs=blobs)


@read_router.get("/api/models/{namespace}/{repo}/auth-check", status_code=204)
def auth_check(session: SessionDep, namespace: Part, repo: Part) -> None:
    """Answer 204 if the model exists and the key may read it."""
    _get_repo(session, namespace, repo)


@read_router.get("/api/models/{namespace}/{repo}/revision/{revision:path}", responses=NO_REVISION)
def revision_info(
    session: SessionDep, namespace: Part, repo: Part, revision: AnyRev, blobs: bool = False
) -> dict[str, Any]:
    """Describe a revision and list its files."""
    found = _read_whole_revision(session, namespace, repo, revision)
    return listing.describe_model(f"{namespace}/{repo}", found, blobs=blobs)


TREE = "/api/models/{namespace}/{repo}/tree/{revision}"


@read_router.get(TREE, responses=NO_REVISION)
@read_router.get(
    TREE + "/{folder:path}", responses=NO_REVISION | documented(errors.RevisionNotFound, errors.EntryNotFound)
)
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
    """List the files and folders of a revision, or of one of its folders. The header `Link` has the next page."""
    name, folder = _split(f"{revision}/{folder}")
    found = _read_revision(session, namespace, repo, name)
    entries = listing.list_tree(found, folder=folder, recursive=recursive, expand=expand)
    if not entries:
        raise errors.EntryNotFound(f"There is no folder {folder[:200]!r} in {namespace}/{repo}.", commit=found.commit)
    entries, next_cursor = listing.paginate(entries, limit=limit, cursor=cursor)
    link_next.set(next_cursor)
    return entries


@read_router.post("/api/models/{namespace}/{repo}/paths-info/{revision:path}", responses=NO_REVISION)
def paths_info(
    session: SessionDep,
    namespace: Part,
    repo: Part,
    revision: AnyRev,
    paths: Annotated[list[str], Form(max_length=MAX_PAGE)],
    expand: Annotated[bool, Form()] = False,
) -> list[dict[str, Any]]:
    """Describe the requested files and folders that a revision has."""
    found = _read_whole_revision(session, namespace, repo, revision)
    requested = {path.strip("/") for path in paths}
    return [entry for entry in listing.list_tree(found, recursive=True, expand=expand) if entry["path"] in requested]


@read_router.get("/api/models/{namespace}/{repo}/refs")
def refs(session: SessionDep, namespace: Part, repo: Part) -> dict[str, list[dict[str, str]]]:
    """List the revisions: aliases as branches, versions as tags."""
    aliases, versions = list_revisions(session, model=_get_repo(session, namespace, repo))
    return {
        "branches": listing.list_refs("heads", aliases),
        "tags": listing.list_refs("tags", versions),
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


router.include_router(read_router)


def _split(path: str) -> tuple[str, str]:
    """Split what follows `resolve/`, `tree/` or `revision/` into the revision and the rest.

    `refs/heads/x` and `refs/tags/v1`, as /refs lists them, are the revisions `x` and `v1`.
    """
    parts = path.split("/", 3)
    if parts[0] == "refs" and len(parts) > 2 and parts[1] in ("heads", "tags"):
        return parts[2], "".join(parts[3:])
    revision, _, rest = path.partition("/")
    return revision, rest


def _get_repo(session: Session, namespace: str, repo: str) -> Model:
    model = find_model(session, name=repo)
    if model is None or model.namespace != namespace:
        raise errors.RepoNotFound(f"There is no model {namespace}/{repo}; GET /v1/models lists them.")
    return model


def _read_revision(session: Session, namespace: str, repo: str, revision: str) -> Revision:
    """Return what a revision serves, or raise its problem as the Hub's."""
    model = _get_repo(session, namespace, repo)
    try:
        return read_revision(session, model=model, revision=revision)
    except CheckpointRetracted as problem:
        raise errors.RevisionRetracted(problem.detail) from None
    except (CheckpointNotFound, CheckpointNotPublished) as problem:
        raise errors.RevisionNotFound(problem.detail) from None


def _read_whole_revision(session: Session, namespace: str, repo: str, path: str) -> Revision:
    """Do the same for a path that is a revision without a rest."""
    revision, rest = _split(path)
    if rest:
        raise errors.RevisionNotFound(f"{namespace}/{repo} has no version, alias or commit {path[:200]!r}.")
    return _read_revision(session, namespace, repo, revision)
