"""The clients with a service that returns errors, is down, is slow, or breaks the connection."""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from emender import (
    ApiError,
    Client,
    Conflict,
    ConnectionFailed,
    EmenderError,
    NotFound,
    RateLimited,
    ValidationFailed,
    WaitTimeout,
    WorkFailed,
)
from emender.requests import MAX_DELAY_SECONDS
from emender.schemas.common import Progress
from emender.schemas.edits import EditBatchOut

MODEL: dict[str, Any] = {
    "id": "00000000-0000-7000-8000-000000000000", "name": "emoji", "namespace": "emender", "source": "pipeline",
    "revision": None, "classifier": None, "license": None, "state": "ready", "family": "sd1", "encoders": [],
    "digest": None, "problem": None, "created_by": "test", "created_at": "2026-11-24T12:00:00Z",
}  # fmt: skip


def status(state: Any, **more: Any) -> Any:
    return {"id": MODEL["id"], "state": state, "attempt": 1, "progress": None, "problem": None} | more


class Stream(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """Events, and then an error of the connection."""

    def __init__(self, *events: Any, then: Any = None) -> None:
        self.events, self.then = events, then

    def __iter__(self) -> Iterator[Any]:
        yield b": still here\n\n"
        for number, event in self.events:
            yield f"event: state\nid: {number}\ndata: {json.dumps(event)}\n\n".encode()
        if self.then is not None:
            raise self.then

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


def stream(*events: Any, then: Any = None) -> Any:
    headers = {"Content-Type": "text/event-stream"}
    return httpx2.Response(200, headers=headers, stream=Stream(*events, then=then))


@pytest.fixture
def answered(
    create_client: Callable[..., Client], delays: list[float]
) -> Callable[..., tuple[Client, list[httpx2.Request]]]:
    """A client that gets these responses in turn, and the requests that it sends."""

    def make(*answers: Any, **options: Any) -> Any:
        sent, left = [], list(answers)

        def answer(request: Any) -> Any:
            sent.append(request)
            given = left.pop(0)
            if isinstance(given, Exception):
                raise given
            return given

        transport = httpx2.MockTransport(answer)
        return create_client("http://service/", api_key="em_a_b", transport=transport, **options), sent

    return make


class TestRetries:
    def test_post_is_sent_again_under_the_same_key(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]], delays: list[float]
    ) -> None:
        busy = httpx2.Response(409, headers={"Retry-After": "3"})
        answers = [httpx2.ConnectError("gone"), httpx2.Response(503), busy, httpx2.Response(202, json=MODEL)]
        client, sent = answered(*answers)
        assert client.models.register("emoji", source="pipeline").name == "emoji"
        assert len({request.headers["Idempotency-Key"] for request in sent}) == 1
        assert {request.content for request in sent} == {b'{"name": "emoji", "source": "pipeline"}'}
        assert sent[0].headers["Authorization"] == "Bearer em_a_b"
        assert delays[0] < delays[1] and delays[2] == 3

    def test_each_call_has_a_key_of_its_own(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        client, sent = answered(*[httpx2.Response(202, json=MODEL) for _ in "ab"])
        for _ in "ab":
            client.models.register("emoji", source="pipeline")
        assert len({request.headers["Idempotency-Key"] for request in sent}) == 2

    def test_retry_after_is_obeyed(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]], delays: list[float]
    ) -> None:
        client, _ = answered(httpx2.Response(429, headers={"Retry-After": "7"}), httpx2.Response(200, json=MODEL))
        client.models.get("emoji")
        assert delays == [7]

    def test_too_long_a_wait_is_left_to_the_caller(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]], delays: list[float]
    ) -> None:
        later = {"Retry-After": str(int(MAX_DELAY_SECONDS) + 1)}
        client, sent = answered(httpx2.Response(429, headers=later))
        with pytest.raises(RateLimited, match="EMENDER_RATE_LIMIT"):
            client.models.get("emoji")
        assert (len(sent), delays) == (1, [])

    def test_connection_that_always_fails_is_an_error(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        client, sent = answered(*[httpx2.ConnectError("refused")] * 3, retries=2)
        with pytest.raises(ConnectionFailed, match="No response from http://service .refused.") as error:
            client.models.get("emoji")
        assert error.value.next_step is not None and "emender serve" in error.value.next_step
        assert len(sent) == 3

    def test_conflict_is_not_retried(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        client, sent = answered(httpx2.Response(409), httpx2.Response(200, json=MODEL))
        with pytest.raises(Conflict):
            client.models.get("emoji")
        assert len(sent) == 1


class TestErrors:
    def test_problem_names_its_fields(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        document = {
            "type": "https://emender.dev/problems/invalid-request",
            "title": "Invalid request",
            "status": 422,
            "detail": "2 fields are wrong.",
            "instance": "/v1/models/emoji/apply",
            "errors": [
                {"pointer": "/alpha", "detail": "must be below 1"},
                {"pointer": "/layers/0", "detail": "no such layer"},
            ],
        }
        client, _ = answered(httpx2.Response(422, json=document, headers={"X-Request-ID": "r-1"}))
        with pytest.raises(ValidationFailed) as error:
            client.checkpoints.apply("emoji")
        assert str(error.value).splitlines() == [
            "Invalid request (422): 2 fields are wrong.",
            "  /alpha: must be below 1",
            "  /layers/0: no such layer",
        ]
        found = error.value
        assert (found.type, found.request_id, found.errors[1].pointer) == (document["type"], "r-1", "/layers/0")

    def test_error_without_a_problem_document_is_an_api_error(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        client, _ = answered(httpx2.Response(404, text="<html>nginx</html>"))
        with pytest.raises(NotFound, match="Not Found .404.: <html>nginx"):
            client.models.get("emoji")

    def test_success_of_another_service_is_an_error(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        client, _ = answered(httpx2.Response(200, text="<html>hello</html>"))
        with pytest.raises(EmenderError, match="Check that EMENDER_URL"):
            client.models.get("emoji")

    def test_api_key_is_sent_to_no_other_host(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        client, sent = answered(httpx2.Response(307, headers={"Location": "https://elsewhere.example/v1/models"}))
        with pytest.raises(ApiError, match="If you trust it, set EMENDER_URL to it"):
            client.models.get("emoji")
        assert [request.url.host for request in sent] == ["service"]

    def test_download_from_a_bucket_sends_no_api_key(
        self,
        answered: Callable[..., tuple[Client, list[httpx2.Request]]],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        sent_elsewhere = []

        def respond(request: Any) -> Any:
            sent_elsewhere.append(request)
            return httpx2.Response(200, text="x")

        client, _ = answered(httpx2.Response(302, headers={"Location": "https://bucket.example/x?signature=1"}))
        for name in ("Client", "AsyncClient"):
            create = partial(getattr(httpx2, name), transport=httpx2.MockTransport(respond))
            monkeypatch.setattr(httpx2, name, create)
        assert client.checkpoints.download("emoji", "v1", "a/b", tmp_path / "b").read_text() == "x"
        assert sent_elsewhere[0].url.host == "bucket.example"
        assert "Authorization" not in sent_elsewhere[0].headers

    def test_damaged_download_leaves_no_file(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]], tmp_path: Path
    ) -> None:
        client, _ = answered(httpx2.Response(200, text="x", headers={"ETag": f'"{"0" * 64}"'}))
        with pytest.raises(Exception, match="damaged"):
            client.checkpoints.download("emoji", "v1", "a", tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


class TestWait:
    def test_wait_returns_at_the_end_of_the_work(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        progress = {"stage": "storing", "done": 1, "total": 2}
        events = [("1", status("registering")), ("2", status("registering", progress=progress))]
        client, sent = answered(stream(*events, ("3", status("ready"))), httpx2.Response(200, json=MODEL))
        seen = []
        assert client.models.wait("emoji", on_status=lambda found: seen.append(found.progress or found.state)).id
        assert seen == ["registering", Progress(stage="storing", done=1, total=2), "ready"]
        assert [request.url.path for request in sent] == ["/v1/models/emoji/events", "/v1/models/emoji"]

    def test_broken_stream_is_resumed(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        first = stream(("1", status("registering")), then=httpx2.ReadError("cut"))
        away = [httpx2.ConnectError("restarting"), httpx2.Response(503, headers={"Retry-After": "2"})]
        client, sent = answered(first, *away, stream(("2", status("ready"))))
        assert [found.state for found in client.models.events("emoji")] == ["registering", "ready"]
        assert [request.headers.get("Last-Event-ID") for request in sent] == [None, "1", "1", "1"]

    def test_stream_that_ends_early_is_resumed(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        client, _ = answered(stream(("1", status("registering"))), stream(("2", status("ready"))))
        assert [found.state for found in client.models.events("emoji")] == ["registering", "ready"]

    def test_wait_fails_if_the_connection_fails(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        client, _ = answered(stream(), *[httpx2.ConnectError("gone")] * 2, retries=2)
        with pytest.raises(ConnectionFailed):
            client.models.wait("emoji")

    def test_failed_work_is_an_error(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        problem = {"title": "No weights", "detail": "the folder holds no safetensors", "errors": []}
        failed = MODEL | {"state": "failed", "problem": problem}
        client, _ = answered(stream(("1", status("failed", problem=problem))), httpx2.Response(200, json=failed))
        with pytest.raises(WorkFailed, match="emoji failed: the folder holds no safetensors") as error:
            client.models.wait("emoji")
        assert error.value.resource.state == "failed"

    def test_wait_ends_after_the_timeout(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        client, _ = answered(stream(("1", status("registering"))))
        with pytest.raises(WaitTimeout, match="/v1/models/emoji is still in progress"):
            client.models.wait("emoji", timeout=-1)

    def test_silent_stream_ends_at_the_deadline(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        client, _ = answered(stream(("1", status("registering")), then=httpx2.ReadTimeout("silence")))
        events = client._connection.events("/v1/models/emoji", deadline=time.monotonic() + 0.2)
        assert next(events).state == "registering"
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass
        with pytest.raises(WaitTimeout):
            next(events)

    def test_get_with_wait_is_a_long_poll(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        client, sent = answered(httpx2.Response(200, json=MODEL))
        client.models.get("emoji", wait=30)
        assert sent[0].headers["Prefer"] == "wait=30"


EDIT = {
    "id": MODEL["id"], "model": "emoji", "source": "dog", "destination": {"prompt": "cat"}, "templates": ["{}"],
    "settings": {}, "reason": None, "labels": {}, "state": "ready", "progress": None, "attempt": 1, "problem": None,
    "value": None, "created_by": "test", "created_at": "2026-11-24T12:00:00Z", "updated_at": "2026-11-24T12:00:00Z",
}  # fmt: skip
BATCH = EditBatchOut.model_validate({"count": 2, "edits": [{"id": EDIT["id"], "source": source} for source in "ab"]})


class TestWaitForBatch:
    def test_returns_all_edits_in_order_with_failed_ones(
        self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]
    ) -> None:
        states = [{"state": "optimizing"}, {"source": "a"}, {"source": "b", "state": "failed"}]
        client, sent = answered(*[httpx2.Response(200, json=EDIT | fields) for fields in states])
        edits = client.edits.wait_batch(BATCH)
        assert [(edit.source, edit.state) for edit in edits] == [("a", "ready"), ("b", "failed")]
        assert {request.headers["Prefer"] for request in sent} == {"wait=10"}

    def test_ends_after_the_timeout(self, answered: Callable[..., tuple[Client, list[httpx2.Request]]]) -> None:
        client, _ = answered(httpx2.Response(200, json=EDIT | {"state": "queued"}))
        with pytest.raises(WaitTimeout, match="2 of 2 edits have not ended"):
            client.edits.wait_batch(BATCH, timeout=-1)


def test_wait_with_progress_prints_each_state(
    answered: Callable[..., tuple[Client, list[httpx2.Request]]], capsys: pytest.CaptureFixture[str]
) -> None:
    events = [("1", status("registering")), ("2", status("ready"))]
    client, _ = answered(stream(*events), httpx2.Response(200, json=MODEL))
    client.models.wait("emoji", progress=True)
    assert capsys.readouterr().err == "model emoji: registering\nmodel emoji: ready\n"
