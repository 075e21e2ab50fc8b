"""The read half of the Hugging Face Hub's protocol, for `from_pretrained`, `snapshot_download` and `hf download`.

With `HF_ENDPOINT` at this service, revisions are versions (`v3`), aliases (`production`), commits, or `main`: what the
alias `production` points at, else the newest published version. A revision serves the whole pipeline.
"""

from datetime import UTC
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials
from sqlalchemy.orm import Session

from app.auth.dependencies import authenticate, bearer, requires
from app.checkpoints.delivery import deliver
from app.checkpoints.errors import FileUnreadable, RangeNotSatisfiable
from app.checkpoints.publish import StoredFile
from app.checkpoints.queries import MAIN, checkpoint_at
from app.checkpoints.service import ServedFile
from app.db.models import Model
from app.dependencies import SessionDep, StoreDep
from app.hub import queries
from app.hub.errors import (
    EntryNotFound,
    RepoNotFound,
    RevisionNotFound,
    RevisionRetracted,
    ScopeMissing,
    TokenInvalid,
    TokenMissing,
)
from app.hub.queries import Reference, Revision
from app.problems import Forbidden, Unauthorized, documented
from app.text import Text

POINTER_SIZE = 134  # bytes of the git-lfs pointer that the Hub would keep in its place


def check_reader(
    session: SessionDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> None:
    """A key with the scope `read`, sent as a Hub token; what is wrong with it is said in the Hub's words."""
    if credentials is None:
        raise TokenMissing("This endpoint needs a token: an API key with the scope 'read'.", challenge=True)
    try:
        requires("read")(authenticate(session, credentials))
    except Unauthorized:
        raise TokenInvalid(TokenInvalid.MESSAGE, challenge=True) from None
    except Forbidden as error:
        raise ScopeMissing(error.detail) from None


router = APIRouter(
    tags=["hub"], dependencies=[Depends(check_reader)], responses=documented(RepoNotFound, TokenMissing, ScopeMissing)
)

Part = Annotated[Text, Path(max_length=96)]
Rev = Annotated[Text, Path(max_length=96, examples=["production", "v3"])]

RESOLVE = "/{namespace}/{repo}/resolve/{revision}/{path:path}"


@router.head(RESOLVE, include_in_schema=False)
@router.get(
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
    found = _revision(session, namespace=namespace, repo=repo, revision=revision)
    file = found.files.get(path)
    if file is None:
        raise EntryNotFound(f"There is no {path[:200]!r} in {found.repo} at {revision}.", commit=found.commit)
    served = ServedFile(file.path, file.sha256, file.size, commit=found.commit)
    return deliver(request, served, store=store, headers={"X-Repo-Commit": found.commit})


@router.get("/api/models/{namespace}/{repo}")
def model_info(session: SessionDep, namespace: Part, repo: Part, blobs: bool = False) -> dict[str, Any]:
    """Describe the revision `main` and list its files."""
    return _info(_revision(session, namespace=namespace, repo=repo, revision=MAIN), blobs=blobs)


@router.get(
    "/api/models/{namespace}/{repo}/revision/{revision}", responses=documented(RevisionNotFound, RevisionRetracted)
)
def revision_info(
    session: SessionDep, namespace: Part, repo: Part, revision: Rev, blobs: bool = False
) -> dict[str, Any]:
    """Describe a revision and list its files."""
    return _info(_revision(session, namespace=namespace, repo=repo, revision=revision), blobs=blobs)


TREE = "/api/models/{namespace}/{repo}/tree/{revision}"


@router.get(TREE, responses=documented(RevisionNotFound, RevisionRetracted))
def root_tree(
    session: SessionDep,
    namespace: Part,
    repo: Part,
    revision: Rev,
    recursive: Annotated[bool, Query(description="also what lies in folders")] = False,
) -> list[dict[str, Any]]:
    """List the files and folders of a revision."""
    found = _revision(session, namespace=namespace, repo=repo, revision=revision)
    return _tree(found, folder="", recursive=recursive)


@router.get(TREE + "/{folder:path}", responses=documented(RevisionNotFound, RevisionRetracted, EntryNotFound))
def folder_tree(
    session: SessionDep, namespace: Part, repo: Part, revision: Rev, folder: str, recursive: bool = False
) -> list[dict[str, Any]]:
    """List the files and folders below a folder of a revision."""
    found = _revision(session, namespace=namespace, repo=repo, revision=revision)
    entries = _tree(found, folder=folder.strip("/") + "/", recursive=recursive)
    if not entries:
        raise EntryNotFound(f"There is no folder {folder[:200]!r} in {found.repo}.", commit=found.commit)
    return entries


@router.get("/api/models/{namespace}/{repo}/refs")
def refs(session: SessionDep, namespace: Part, repo: Part) -> dict[str, list[dict[str, str]]]:
    """List the revisions: aliases as branches, versions as tags."""
    model = _model(session, namespace=namespace, repo=repo)
    return {
        "branches": [_ref(reference, kind="heads") for reference in queries.branches(session, model=model)],
        "tags": [_ref(reference, kind="tags") for reference in queries.tags(session, model=model)],
        "converts": [],
    }


def _model(session: Session, *, namespace: str, repo: str) -> Model:
    model = queries.find_model(session, namespace=namespace, repo=repo)
    if model is None:
        raise RepoNotFound(f"There is no model {namespace}/{repo}; GET /v1/models lists them.")
    return model


def _revision(session: Session, *, namespace: str, repo: str, revision: str) -> Revision:
    model = _model(session, namespace=namespace, repo=repo)
    checkpoint = checkpoint_at(session, model_id=model.id, revision=revision)
    if checkpoint is None:
        raise RevisionNotFound(f"{namespace}/{repo} has no version, alias or commit {revision!r}.")
    if checkpoint.state == "retracted":
        raise RevisionRetracted(f"{namespace}/{repo} at {revision} is v{checkpoint.number}, which was retracted.")
    if checkpoint.state != "published":
        raise RevisionNotFound(f"{namespace}/{repo} at {revision} is {checkpoint.state}, not published.")
    return queries.read_revision(session, model=model, checkpoint=checkpoint)


def _info(revision: Revision, *, blobs: bool) -> dict[str, Any]:
    published = revision.published_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    tags = ["diffusers", "safetensors", "text-to-image", f"version:{revision.version}"]
    return {
        "id": revision.repo,
        "modelId": revision.repo,
        "sha": revision.commit,
        "lastModified": published,
        "private": True,
        "gated": False,
        "disabled": False,
        "tags": tags,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "siblings": [_sibling(file, blobs=blobs) for file in revision.files.values()],
    }


def _sibling(file: StoredFile, *, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": file.path}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.sha256[:40]}
        if _is_large(file):
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": POINTER_SIZE}
    return sibling


def _tree(revision: Revision, *, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries below `folder`, which is empty or ends in a slash; without `recursive` its direct ones."""
    entries: dict[str, dict[str, Any]] = {}
    for file in revision.files.values():
        if not file.path.startswith(folder):
            continue
        parts = file.path[len(folder) :].split("/")
        parents = [folder + "/".join(parts[:depth]) for depth in range(1, len(parts))]
        for parent in parents if recursive else parents[:1]:
            entries[parent] = {"type": "directory", "path": parent, "oid": revision.commit, "size": 0}
        if recursive or len(parts) == 1:
            entry: dict[str, Any] = {"type": "file", "path": file.path, "oid": file.sha256[:40], "size": file.size}
            if _is_large(file):
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": POINTER_SIZE}
            entries[file.path] = entry
    return [entries[path] for path in sorted(entries)]


def _ref(reference: Reference, *, kind: str) -> dict[str, str]:
    return {"name": reference.name, "ref": f"refs/{kind}/{reference.name}", "targetCommit": reference.commit}


def _is_large(file: StoredFile) -> bool:
    """Whether the Hub would keep it in git-lfs."""
    return file.path.endswith(".safetensors")
