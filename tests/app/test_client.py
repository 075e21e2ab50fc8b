"""What the client does when the service refuses, is away, or has work under way."""

import httpx
import pytest

from app.client import Client, ClientError, Failed, Refused


def client_of(monkeypatch, *answers):
    """A client that gets these answers in turn, and the requests that it sends."""
    sent = []
    left = list(answers)

    def answer(request):
        sent.append(request)
        given = left.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr("app.client.time.sleep", lambda _: None)
    return Client("http://service/", api_key="em_a_b", transport=httpx.MockTransport(answer)), sent


def test_post_is_sent_again_under_the_same_key(monkeypatch):
    client, sent = client_of(
        monkeypatch, httpx.ConnectError("gone"), httpx.Response(503), httpx.Response(202, json={"id": "x"})
    )
    assert client.create_edit("emoji", {"source": "dog"}) == {"id": "x"}
    assert len({request.headers["Idempotency-Key"] for request in sent}) == 1
    assert {request.url.path for request in sent} == {"/v1/models/emoji/edits"}
    assert sent[0].headers["Authorization"] == "Bearer em_a_b"


def test_nobody_answers(monkeypatch):
    client, _ = client_of(monkeypatch, *[httpx.ConnectError("refused")] * 4)
    with pytest.raises(ClientError, match="No Emender answers at http://service"):
        client.get("/v1/models")


def test_problem_names_its_fields(monkeypatch):
    document = {
        "title": "Invalid request",
        "detail": "2 fields are wrong.",
        "errors": [
            {"pointer": "/alpha", "detail": "must be below 1"},
            {"pointer": "/layers/0", "detail": "no such layer"},
        ],
    }
    client, _ = client_of(monkeypatch, httpx.Response(422, json=document))
    with pytest.raises(Refused) as refused:
        client.apply("emoji", {})
    assert str(refused.value).splitlines() == [
        "Invalid request (422): 2 fields are wrong.",
        "  /alpha: must be below 1",
        "  /layers/0: no such layer",
    ]


def test_answer_that_is_no_problem_document(monkeypatch):
    client, _ = client_of(monkeypatch, httpx.Response(502, text="<html>bad gateway</html>"))
    with pytest.raises(Refused, match="Bad Gateway"):
        client.get("/v1/models")


def test_wait_ends_with_the_work(monkeypatch):
    states = [httpx.Response(200, json={"state": state}) for state in ("queued", "optimizing", "ready")]
    client, _ = client_of(monkeypatch, *states)
    seen = []
    assert client.wait("/v1/edits/x", seen=lambda edit: seen.append(edit["state"])) == {"state": "ready"}
    assert seen == ["queued", "optimizing", "ready"]


def test_wait_raises_for_failed_work(monkeypatch):
    failed = {"state": "failed", "source": "dog", "problem": {"detail": "the loss is not finite"}}
    client, _ = client_of(monkeypatch, httpx.Response(200, json=failed))
    with pytest.raises(Failed, match="dog is failed: the loss is not finite"):
        client.wait("/v1/edits/x")


def test_wait_gives_up(monkeypatch):
    client, _ = client_of(monkeypatch, *[httpx.Response(200, json={"state": "queued"})] * 3)
    with pytest.raises(ClientError, match="still queued"):
        client.wait("/v1/edits/x", timeout=-1)


def test_checkpoints_reads_all_pages(monkeypatch):
    pages = [
        {"items": [{"version": "v3"}, {"version": "v2"}], "next": "c"},
        {"items": [{"version": "v1"}], "next": None},
    ]
    client, sent = client_of(monkeypatch, *[httpx.Response(200, json=page) for page in pages])
    assert [checkpoint["version"] for checkpoint in client.checkpoints("emoji")] == ["v3", "v2", "v1"]
    assert sent[1].url.params["cursor"] == "c"
