"""Write revisions and their files in the JSON that Hub clients parse."""

from collections.abc import Mapping
from datetime import UTC
from typing import Any

from app.checkpoints.files import Revision
from editing.files import File

POINTER_SIZE = 134  # bytes of the git-lfs pointer that the Hub stores in place of a large file
Entry = dict[str, Any]


def describe_model(repo: str, revision: Revision, *, blobs: bool) -> Entry:
    """Describe a model at a revision; with `blobs`, also the size and digest of each file."""
    tags = ["diffusers", "safetensors", "text-to-image", f"version:{revision.version}"]
    return {
        "id": repo,
        "modelId": repo,
        "author": repo.partition("/")[0],
        "sha": revision.commit,
        "lastModified": _published(revision),
        "createdAt": _published(revision),
        "private": True,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "siblings": [_sibling(file, blobs=blobs) for file in revision.files.values()],
    }


def list_tree(revision: Revision, *, folder: str = "", recursive: bool, expand: bool = False) -> list[Entry]:
    """List the entries below `folder` by path; without `recursive` only its direct ones.

    With `expand` each entry names its last commit, which is that of the revision.
    """
    below = folder.strip("/") + "/" if folder.strip("/") else ""
    entries: dict[str, Entry] = {}
    for file in revision.files.values():
        if not file.path.startswith(below):
            continue
        parts = file.path[len(below) :].split("/")
        parents = [below + "/".join(parts[:depth]) for depth in range(1, len(parts))]
        for parent in parents if recursive else parents[:1]:
            entries[parent] = {"type": "directory", "path": parent, "oid": revision.commit, "size": 0}
        if recursive or len(parts) == 1:
            entry: Entry = {"type": "file", "path": file.path, "oid": file.sha256[:40], "size": file.size}
            if _is_large(file):
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": POINTER_SIZE}
            entries[file.path] = entry
    if expand:
        for entry in entries.values():
            entry["lastCommit"] = {"id": revision.commit, "title": revision.version, "date": _published(revision)}
    return [entries[path] for path in sorted(entries)]


def paginate(entries: list[Entry], *, limit: int, cursor: str | None) -> tuple[list[Entry], str | None]:
    """Return `limit` entries after the path `cursor`, and the cursor of the next page, if there is one."""
    if cursor is not None:
        entries = [entry for entry in entries if entry["path"] > cursor]
    return entries[:limit], entries[limit - 1]["path"] if len(entries) > limit else None


def list_refs(kind: str, commits: Mapping[str, str]) -> list[dict[str, str]]:
    """List references of a kind, `heads` or `tags`, from their commits by name."""
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in commits.items()]


def _sibling(file: File, *, blobs: bool) -> Entry:
    sibling: Entry = {"rfilename": file.path}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.sha256[:40]}
        if _is_large(file):
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": POINTER_SIZE}
    return sibling


def _published(revision: Revision) -> str:
    return revision.published_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _is_large(file: File) -> bool:
    """Return whether the Hub would store it in git-lfs."""
    return file.path.endswith(".safetensors")
