"""Checkpoints: made from edits, compared, pulled, named by aliases, traced, signed."""

from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path
from typing import Unpack

from emender._async.connection import Connection
from emender.errors import ApiError, EmenderError
from emender.files import MANIFEST, read_manifest, read_sha256
from emender.parameters import Alias, ApplyFields, build_apply_body
from emender.requests import OnStatus, drop_none, encode_body, file_path, url_path
from emender.schemas.checkpoints import (
    AliasOut,
    AliasPeriod,
    ApplyPlan,
    CheckpointOut,
    CheckpointSummary,
    DifferenceOut,
    FileProvenance,
)
from emender.schemas.common import WorkStatus
from emender.schemas.models import ModelOut
from emender.schemas.signing import SigningKeyOut


class Checkpoints:
    """Checkpoints of a model: its pipeline with edits applied."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def apply(self, model: str, **fields: Unpack[ApplyFields]) -> CheckpointOut:
        """Apply edits and publish the result as the model's next version.

        `edits` is "ready" or a list of ids; or `from_` names a checkpoint to start from, with `add` and `remove`.
        """
        path = url_path("models", model, "apply")
        return await self._connection.post(path, CheckpointOut, json=build_apply_body(fields))

    async def plan(self, model: str, **fields: Unpack[ApplyFields]) -> ApplyPlan:
        """Return what `apply` would do, without doing it."""
        body = build_apply_body(fields) | {"dry_run": True}
        return await self._connection.post(url_path("models", model, "apply"), ApplyPlan, json=body)

    def list(self, model: str) -> AsyncIterator[CheckpointSummary]:
        """List the checkpoints of a model, newest first."""
        return self._connection.pages(url_path("models", model, "checkpoints"), CheckpointSummary)

    async def get(self, model: str, revision: str, *, wait: int | None = None) -> CheckpointOut:
        """Read a checkpoint by its version, an alias or its commit. `wait`: seconds to wait for it, at most 60."""
        return await self._connection.get(url_path("models", model, "checkpoints", revision), CheckpointOut, wait=wait)

    def events(self, model: str, revision: str) -> AsyncIterator[WorkStatus]:
        """Follow the build: its status at each change, until it has ended."""
        return self._connection.events(url_path("models", model, "checkpoints", revision))

    async def wait(
        self,
        model: str,
        revision: str,
        *,
        on_status: OnStatus | None = None,
        progress: bool = False,
        timeout: float | None = None,
    ) -> CheckpointOut:
        """Wait until a checkpoint is published. Raises `WorkFailed`, and `WaitTimeout` after `timeout` seconds."""
        return await self._connection.wait(
            url_path("models", model, "checkpoints", revision),
            CheckpointOut,
            label=f"checkpoint {revision}",
            on_status=on_status,
            progress=progress,
            timeout=timeout,
        )

    async def difference(self, model: str, revision: str, *, against: str = "base") -> DifferenceOut:
        """Compare a checkpoint with another, or with the base model."""
        path = url_path("models", model, "checkpoints", revision, "difference")
        return await self._connection.get(path, DifferenceOut, against=against)

    async def retract(self, model: str, version: str, *, reason: str) -> CheckpointOut:
        """Stop serving a checkpoint. Its record stays."""
        path = url_path("models", model, "checkpoints", version, "retract")
        return await self._connection.post(path, CheckpointOut, json={"reason": reason})

    async def download(self, model: str, revision: str, path: str, to: Path) -> Path:
        """Download one changed file of a checkpoint and verify its sha256."""
        return await self._connection.download(
            file_path(url_path("models", model, "checkpoints", revision, "files"), path), to
        )

    async def pull(self, model: str, revision: str, folder: Path) -> CheckpointOut:
        """Download the whole pipeline of a checkpoint into a folder, for `from_pretrained`.

        Every file is verified by its sha256. Files that the folder has already are not downloaded again. Raises
        `EmenderError` if the folder has other files. Signatures are verified by `emender checkpoints pull`.
        """
        checkpoint = await self.get(model, revision)
        if checkpoint.commit is None or checkpoint.state != "published":
            raise EmenderError(f"{checkpoint.version} is {checkpoint.state}; only a published checkpoint has files.")
        namespace = (await self._connection.get(url_path("models", model), ModelOut)).namespace
        # By the commit, so that all files are of one checkpoint while the alias moves.
        resolve = f"/{namespace}/{model}/resolve/{checkpoint.commit}"
        published = {file.path: file.sha256 for file in checkpoint.files}
        published |= read_manifest(await self._connection.read_file(file_path(resolve, MANIFEST)))
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        if unexpected := sorted(present - published.keys()):
            raise EmenderError(
                f"{folder} has files that the checkpoint does not have: {', '.join(unexpected[:5])}.",
                next_step="Choose an empty folder, or the folder of an earlier pull of the same model.",
            )
        for path, sha256 in published.items():
            if path not in present or read_sha256(folder / path) != sha256:
                await self._connection.download(file_path(resolve, path), folder / path)
                if read_sha256(folder / path) != sha256:
                    raise EmenderError(f"{path} is not the published file.", next_step="Pull again.")
        return checkpoint


class Aliases:
    """Aliases such as `production`, moved from checkpoint to checkpoint by compare-and-swap."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list(self, model: str) -> list[AliasOut]:
        """List the aliases of a model by name."""
        return await self._connection.get(url_path("models", model, "aliases"), list[AliasOut])

    async def get(self, model: str, alias: str) -> Alias:
        """Read an alias, for `expected` of `move` and `delete`."""
        response = await self._connection.request("GET", url_path("models", model, "aliases", alias))
        return Alias(**response.json(), etag=response.headers["ETag"])

    def history(self, model: str, alias: str, *, at: date | str | None = None) -> AsyncIterator[AliasPeriod]:
        """List where an alias pointed, newest first; with `at`, only at that time or on that day (UTC)."""
        path = url_path("models", model, "aliases", alias, "history")
        return self._connection.pages(path, AliasPeriod, at=at)

    async def move(
        self, model: str, alias: str, version: str, *, expected: Alias | None, reason: str | None = None
    ) -> Alias:
        """Point an alias at a version, if it is still as `expected`. None: the alias must not exist yet.

        Raises `Conflict` with status 412 if someone else moved it.
        """
        path = url_path("models", model, "aliases", alias)
        headers = {"If-Match": expected.etag} if expected else {"If-None-Match": "*"}
        headers["Content-Type"] = "application/json"
        body = encode_body(drop_none(version=version, reason=reason))
        try:
            response = await self._connection.request("PUT", path, content=body, headers=headers)
        except ApiError as error:
            if error.status == 412 and error.attempts > 1:
                current = await self.get(model, alias)
                if current.version == version:  # an earlier attempt moved it, and its response was lost
                    return current
            raise
        return Alias(**response.json(), etag=response.headers["ETag"])

    async def delete(self, model: str, alias: str, *, expected: Alias) -> None:
        """Delete an alias, if it is still as `expected`. Checkpoints stay."""
        path = url_path("models", model, "aliases", alias)
        try:
            await self._connection.request("DELETE", path, headers={"If-Match": expected.etag})
        except ApiError as error:
            if error.attempts == 1 or any(other.name == alias for other in await self.list(model)):
                raise  # else an earlier attempt deleted it, and its response was lost


class Files:
    """Files that came from checkpoints."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def trace(self, sha256: str) -> FileProvenance:
        """Find the checkpoints, and so the edits, that a file came from."""
        return await self._connection.get(url_path("files", sha256), FileProvenance)


class SigningKeys:
    """Public keys that checkpoints are verified with."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def current(self) -> str:
        """Read the key that was used last, as PEM. Compare it with the output of `emender signing-key show`."""
        response = await self._connection.request("GET", url_path("signing-key"))
        return response.text

    async def list(self) -> list[SigningKeyOut]:
        """List all keys that checkpoints were signed with, the last used first."""
        return await self._connection.get(url_path("signing-keys"), list[SigningKeyOut])
