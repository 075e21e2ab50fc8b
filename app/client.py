"""A thin client of the HTTP API: what the commands and the demo speak through. Free of torch."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx

from app.settings import Settings
from deploy.pull import MANIFEST, check, sha256_of

ENDED = frozenset({"ready", "published", "failed", "cancelled", "retracted"})
ATTEMPTS = 4
Json = dict[str, Any]


class ClientError(Exception):
    """What went wrong, readable as it stands."""


class Refused(ClientError):
    """The service answered with a problem (RFC 9457); `document` is its body."""

    def __init__(self, answer: httpx.Response) -> None:
        try:
            document = answer.json()
        except ValueError:
            document = {}
        self.status = answer.status_code
        self.document: Json = document if isinstance(document, dict) else {}
        title = self.document.get("title") or HTTPStatus(answer.status_code).phrase
        lines = [f"{title} ({answer.status_code}): {self.document.get('detail') or answer.text[:200]}"]
        for error in self.document.get("errors", []):
            if error["detail"] not in lines[0] or error["pointer"]:
                lines.append(f"  {error['pointer'] or 'body'}: {error['detail']}")
        super().__init__("\n".join(lines))


class Failed(ClientError):
    """Work that was accepted and has failed; `resource` is what it was for."""

    def __init__(self, resource: Json) -> None:
        self.resource = resource
        problem = resource.get("problem") or {}
        names = (resource.get(field) for field in ("version", "name", "source", "captions_name"))
        name = next(filter(None, names), None)
        super().__init__(f"{name} is {resource['state']}: {problem.get('detail', 'no reason was given')}")


class Client:
    """The service at a URL, asked with an API key.

    A POST carries an Idempotency-Key of its own, so that it is safe to send again when the connection breaks or the
    database is away. Raises `Refused`, `Failed` and, when nobody answers, `ClientError`.
    """

    def __init__(self, url: str, *, api_key: str, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        self.api_key = api_key
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=60.0, transport=transport)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Of `EMENDER_URL` and `EMENDER_API_KEY`, by default the service on this machine and its first admin key."""
        url = settings.url or f"http://{settings.host}:{settings.port}"
        if settings.api_key is not None:
            return cls(url, api_key=settings.api_key.get_secret_value())
        key_file = settings.folder / "admin-key"
        try:
            return cls(url, api_key=key_file.read_text().strip())
        except OSError:
            raise ClientError(
                f"No API key: set EMENDER_API_KEY. (`emender serve --embedded` leaves one in {key_file}.)"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, **options: Any) -> Any:
        """The JSON at a path."""
        return self._ask("GET", path, **options).json()

    def post(self, path: str, body: object) -> Json:
        answer: Json = self._ask("POST", path, json=body).json()
        return answer

    def patch(self, path: str, body: object) -> Json:
        answer: Json = self._ask("PATCH", path, json=body).json()
        return answer

    def delete(self, path: str) -> None:
        self._ask("DELETE", path)

    def register_model(self, name: str, *, source: str, **fields: object) -> Json:
        return self.post("/v1/models", {"name": name, "source": source, **_given(fields)})

    def create_statistics(self, model: str, *, captions: Sequence[str]) -> Json:
        return self.post(f"/v1/models/{model}/statistics", {"captions": list(captions)})

    def upload_image(self, path: Path) -> str:
        """The id by which an edit names the image."""
        answer = self._ask("POST", "/v1/images", files={"file": (path.name, path.read_bytes())})
        image: str = answer.json()["id"]
        return image

    def create_edit(self, model: str, edit: Mapping[str, object]) -> Json:
        return self.post(f"/v1/models/{model}/edits", edit)

    def apply(self, model: str, request: Mapping[str, object]) -> Json:
        """The checkpoint that is being built, or the plan of a dry run."""
        return self.post(f"/v1/models/{model}/apply", request)

    def checkpoints(self, model: str) -> Iterator[Json]:
        """All versions, newest first."""
        return self.pages(f"/v1/models/{model}/checkpoints")

    def pull(self, model: str, *, revision: str, folder: Path) -> Json:
        """Download a revision's whole pipeline into a folder with huggingface_hub; returns the checkpoint.

        Every file is checked against the manifest, and the manifest against its published sha256, so that no key is
        needed; raises `ClientError`.
        """
        from huggingface_hub import snapshot_download  # half a second that the other commands need not wait

        checkpoint: Json = self.get(f"/v1/models/{model}/checkpoints/{revision}")
        if checkpoint["state"] != "published":
            raise ClientError(f"{checkpoint['version']} is {checkpoint['state']}; only a published version has files.")
        namespace = self.get(f"/v1/models/{model}")["namespace"]
        snapshot_download(
            f"{namespace}/{model}",
            revision=checkpoint["commit"],  # so that all files are of one version, wherever an alias moves meanwhile
            endpoint=self.url,
            token=self.api_key,
            local_dir=folder,
        )
        published = {file["path"]: file["sha256"] for file in checkpoint["files"]}
        problems = check(folder, None).problems
        if sha256_of(folder / MANIFEST) != published[MANIFEST]:
            problems[MANIFEST] = "altered"
        if problems:
            what = ", ".join(f"{path} ({problem})" for path, problem in problems.items())
            raise ClientError(f"{what}: not as it was published; empty the folder and pull again.")
        return checkpoint

    def wait(
        self, path: str, *, seen: Callable[[Json], None] | None = None, pause: float = 0.3, timeout: float | None = None
    ) -> Json:
        """Read a model, statistics, an edit or a checkpoint until its work has ended; `seen` is given each answer.

        Raises `Failed` when it has failed or was cancelled, and `ClientError` after `timeout` seconds.
        """
        start = time.monotonic()
        while True:
            resource: Json = self.get(path)
            if seen is not None:
                seen(resource)
            if resource["state"] in ("ready", "published"):
                return resource
            if resource["state"] in ENDED:
                raise Failed(resource)
            if timeout is not None and time.monotonic() - start > timeout:
                raise ClientError(f"{path} is still {resource['state']} after {timeout:.0f} s.")
            time.sleep(pause)

    def pages(self, path: str) -> Iterator[Json]:
        """The items of a list, page by page."""
        cursor = None
        while True:
            page = self.get(path, params={"limit": 200, **_given({"cursor": cursor})})
            yield from page["items"]
            cursor = page["next"]
            if cursor is None:
                return

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Idempotency-Key": str(uuid4())} if method == "POST" else {}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._http.request(method, path, headers=headers, **options)
            except httpx.TransportError as error:
                if attempt == ATTEMPTS:
                    raise ClientError(
                        f"No Emender answers at {self.url} ({error}): start one with `emender serve --embedded`, "
                        "or set EMENDER_URL."
                    ) from error
            else:
                if answer.is_success:
                    return answer
                if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE or attempt == ATTEMPTS:
                    raise Refused(answer)
            time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")


def _given(fields: Mapping[str, object]) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
