"""Published versions: made from edits, compared, pulled, named by aliases, drawn and measured, traced, signed."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from uuid import UUID

from emender.connection import Body, Connection, Seen, at, below, encoded, given
from emender.errors import EmenderError, Refused
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
from emender.schemas.evaluations import EvaluationKind, EvaluationOut
from emender.schemas.models import ModelOut
from emender.schemas.signing import SigningKeyOut

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"


class Checkpoints:
    """Versions of a model with edits written into it.

    >>> plan = client.checkpoints.plan("emoji", {"edits": "ready"})
    >>> made = client.checkpoints.apply("emoji", {"edits": "ready", "alias": "production"})
    >>> client.checkpoints.wait("emoji", made.version).commit
    """

    def __init__(self, connection: Connection, *, api_key: str) -> None:
        self._connection = connection
        self._api_key = api_key

    def apply(self, model: str, request: Body) -> CheckpointOut:
        """Write edits into the model and publish it as the next version: an `ApplyCreate`, or a mapping of the same
        shape."""
        return self._connection.post(at("models", model, "apply"), CheckpointOut, request)

    def plan(self, model: str, request: Body) -> ApplyPlan:
        """What `apply` would do; nothing is created."""
        fields = json.loads(encoded(request))
        return self._connection.post(at("models", model, "apply"), ApplyPlan, {**fields, "dry_run": True})

    def list(self, model: str) -> Iterator[CheckpointSummary]:
        """Newest first."""
        return self._connection.pages(at("models", model, "checkpoints"), CheckpointSummary)

    def get(self, model: str, revision: str, *, wait: int | None = None) -> CheckpointOut:
        """By a version, an alias or a commit; `wait` seconds for it to be built (at most 60)."""
        return self._connection.get(at("models", model, "checkpoints", revision), CheckpointOut, wait=wait)

    def events(self, model: str, revision: str) -> Iterator[WorkStatus]:
        """Its state and progress at each change, until it is built."""
        return self._connection.events(at("models", model, "checkpoints", revision))

    def wait(
        self, model: str, revision: str, *, seen: Seen | None = None, timeout: float | None = None
    ) -> CheckpointOut:
        """The version once it is published. Raises `WorkFailed`, and `WaitedInVain` after `timeout` seconds."""
        path = at("models", model, "checkpoints", revision)
        return self._connection.wait(path, CheckpointOut, seen=seen, timeout=timeout)

    def difference(self, model: str, revision: str, *, against: str = "base") -> DifferenceOut:
        """What differs between two versions, or from the base model."""
        path = at("models", model, "checkpoints", revision, "difference")
        return self._connection.get(path, DifferenceOut, against=against)

    def retract(self, model: str, version: str, *, reason: str) -> CheckpointOut:
        """Stop serving a version; its record stays."""
        path = at("models", model, "checkpoints", version, "retract")
        return self._connection.post(path, CheckpointOut, {"reason": reason})

    def download(self, model: str, revision: str, path: str, to: Path) -> Path:
        """One file of a version, checked against its sha256."""
        return self._connection.download(below(at("models", model, "checkpoints", revision, "files"), path), to)

    def pull(self, model: str, revision: str, folder: Path) -> CheckpointOut:
        """Download a revision's whole pipeline into a folder with huggingface_hub.

        Every file is checked against the manifest, and the manifest against its published sha256, so that no public
        key is needed. Raises `EmenderError` where something else lies in the folder.
        """
        from huggingface_hub import snapshot_download  # half a second that other calls need not wait

        checkpoint = self.get(model, revision)
        if checkpoint.commit is None or checkpoint.state != "published":
            raise EmenderError(f"{checkpoint.version} is {checkpoint.state}; only a published version has files.")
        namespace = self._connection.get(at("models", model), ModelOut).namespace
        snapshot_download(
            f"{namespace}/{model}",
            revision=checkpoint.commit,  # so that all files are of one version, wherever an alias moves meanwhile
            endpoint=self._connection.url,
            token=self._api_key,
            local_dir=folder,
        )
        published = {file.path: file.sha256 for file in checkpoint.files}
        content = (folder / MANIFEST).read_bytes()
        differences = _differences(folder, json.loads(content)["files"])
        if hashlib.sha256(content).hexdigest() != published[MANIFEST]:
            differences[MANIFEST] = "altered"
        if differences:
            what = ", ".join(f"{path} ({difference})" for path, difference in differences.items())
            raise EmenderError(f"{what}: not as it was published.", next_step="Empty the folder and pull again.")
        return checkpoint


def _differences(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Compare a folder with the sha256 of each published file."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    ignored = {path for path in found if path.startswith(".cache/") or path in (MANIFEST, SIGNATURE)}
    differences = dict.fromkeys(files.keys() - found.keys(), "missing")
    differences |= dict.fromkeys(found.keys() - files.keys() - ignored, "unexpected")
    for path in files.keys() & found.keys():
        with found[path].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != files[path]:
                differences[path] = "altered"
    return differences


class Alias(AliasOut):
    """Where an alias points; `etag` names this state of it, and is what a move expects."""

    etag: str


class Aliases:
    """Names such as `production`, moved from version to version by compare-and-swap.

    >>> now = client.aliases.get("emoji", "production")
    >>> client.aliases.move("emoji", "production", "v1", expected=now, reason="draws the wrong flag")
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self, model: str) -> list[AliasOut]:
        """By name."""
        return self._connection.get(at("models", model, "aliases"), list[AliasOut])

    def get(self, model: str, alias: str) -> Alias:
        answer = self._connection.ask("GET", at("models", model, "aliases", alias))
        return Alias(**answer.json(), etag=answer.headers["ETag"])

    def history(self, model: str, alias: str, *, at_time: date | str | None = None) -> Iterator[AliasPeriod]:
        """Where it pointed, newest first; `at_time` leaves what held at a moment or on a day (UTC)."""
        path = at("models", model, "aliases", alias, "history")
        return self._connection.pages(path, AliasPeriod, at=at_time)

    def move(self, model: str, alias: str, version: str, *, expected: Alias | None, reason: str | None = None) -> Alias:
        """Point it at a version, if it still is as `expected`; None: if there is none of this name yet.

        Raises `Refused` with the status 412 where somebody else was faster. A move is done once, also where its answer
        is lost on the way.
        """
        path = at("models", model, "aliases", alias)
        headers = {"If-Match": expected.etag} if expected else {"If-None-Match": "*"}
        headers["Content-Type"] = "application/json"
        try:
            body = encoded(given(version=version, reason=reason))
            answer = self._connection.ask("PUT", path, content=body, headers=headers)
        except Refused as refused:
            if refused.status == 412 and refused.attempts > 1 and (now := self.get(model, alias)).version == version:
                return now  # by an earlier try of this call
            raise
        return Alias(**answer.json(), etag=answer.headers["ETag"])

    def delete(self, model: str, alias: str, *, expected: Alias) -> None:
        """Delete it, if it still is as expected; the versions stay."""
        path = at("models", model, "aliases", alias)
        try:
            self._connection.ask("DELETE", path, headers={"If-Match": expected.etag})
        except Refused as refused:
            gone = refused.attempts > 1 and all(name.name != alias for name in self.list(model))
            if not gone:
                raise


class Evaluations:
    """What is drawn and measured of versions.

    >>> drawn = client.evaluations.create_preview("emoji", "v1", {"prompts": ["a picture of a dog"]})
    >>> client.evaluations.wait("emoji", "v1", drawn.id)
    >>> client.evaluations.download("emoji", "v1", drawn.id, "before-after.png", Path("out/dog.png"))
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create_preview(self, model: str, version: str, preview: Body) -> EvaluationOut:
        """Draw prompts before and after: a `PreviewCreate`, or a mapping of the same shape."""
        return self._connection.post(at("models", model, "checkpoints", version, "previews"), EvaluationOut, preview)

    def create(self, model: str, version: str, evaluation: Body) -> EvaluationOut:
        """Measure by the model's classifier: an `EvaluationCreate`, or a mapping of the same shape."""
        return self._connection.post(_evaluations(model, version), EvaluationOut, evaluation)

    def list(self, model: str, version: str, *, kind: EvaluationKind | None = None) -> Iterator[EvaluationOut]:
        """Newest first."""
        return self._connection.pages(_evaluations(model, version), EvaluationOut, kind=kind)

    def get(self, model: str, version: str, evaluation_id: UUID | str, *, wait: int | None = None) -> EvaluationOut:
        """`wait` seconds for it to end (at most 60)."""
        return self._connection.get(_evaluations(model, version, evaluation_id), EvaluationOut, wait=wait)

    def events(self, model: str, version: str, evaluation_id: UUID | str) -> Iterator[WorkStatus]:
        """Its state and progress at each change, until it has ended."""
        return self._connection.events(_evaluations(model, version, evaluation_id))

    def wait(
        self,
        model: str,
        version: str,
        evaluation_id: UUID | str,
        *,
        seen: Seen | None = None,
        timeout: float | None = None,
    ) -> EvaluationOut:
        """The evaluation once it is ready. Raises `WorkFailed`, and `WaitedInVain` after `timeout` seconds."""
        path = _evaluations(model, version, evaluation_id)
        return self._connection.wait(path, EvaluationOut, seen=seen, timeout=timeout)

    def download(self, model: str, version: str, evaluation_id: UUID | str, name: str, to: Path) -> Path:
        """A picture or a report, checked against its sha256."""
        return self._connection.download(below(_evaluations(model, version, evaluation_id, "files"), name), to)

    def cancel(self, model: str, version: str, evaluation_id: UUID | str) -> EvaluationOut:
        """At once while it is queued, at its next picture while it is drawn."""
        return self._connection.post(_evaluations(model, version, evaluation_id, "cancel"), EvaluationOut)


class Files:
    """Files in the wild.

    >>> [origin.version for origin in client.files.trace(sha256).origins]
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def trace(self, sha256: str) -> FileProvenance:
        """Which versions, and so which edits, a file came from."""
        return self._connection.get(at("files", sha256), FileProvenance)


class SigningKeys:
    """The public keys that versions are verified with.

    >>> Path("public.pem").write_text(client.signing_keys.current())
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def current(self) -> str:
        """The key used last; PEM. Compare it once with what `emender signing-key show` prints beside its file."""
        return self._connection.ask("GET", at("signing-key")).text

    def list(self) -> list[SigningKeyOut]:
        """Every key that versions were ever signed with, the one used last first."""
        return self._connection.get(at("signing-keys"), list[SigningKeyOut])


def _evaluations(model: str, version: str, *names: object) -> str:
    return at("models", model, "checkpoints", version, "evaluations", *names)
