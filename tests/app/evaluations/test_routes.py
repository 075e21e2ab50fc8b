"""Pictures before and after, through the service, on a small real pipeline."""

import io
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image

import editing
from app.db.models import AuditEvent, Checkpoint, Job
from editing.pictures.grid import GAP, LABEL, MARGIN, SPLIT, TILE
from tests.app.checkpoints.conftest import Service

PREVIEWS = "/v1/models/tiny/checkpoints/v1/previews"
EVALUATIONS = "/v1/models/tiny/checkpoints/v1/evaluations"
QUICK: dict[str, Any] = {
    "prompts": ["a photo of cat"],
    "controls": ["a photo of sea"],
    "seeds": [3, 4],
    "num_inference_steps": 2,
}


@pytest.fixture
def version(service: Service) -> Service:
    """v1, with one edit."""
    service.apply(edits=[str(service.edit("cat"))])
    return service


def ask(service: Service, expected: int = 202, **body: Any) -> Any:
    answer = service.client.post(PREVIEWS, json=body, headers=service.keys["apply"])
    assert answer.status_code == expected, answer.text
    return answer


def drawn(service: Service, **body: Any) -> dict[str, Any]:
    location = ask(service, **(QUICK | body)).headers["Location"]
    assert service.runner.work()
    found: dict[str, Any] = service.get(location)
    return found


def grid_of(service: Service, evaluation: dict[str, Any]) -> Image.Image:
    path = f"{EVALUATIONS}/{evaluation['id']}/files/before-after.png"
    answer = service.client.get(path, headers=service.keys["read"])
    assert answer.headers["ETag"] == f'"{evaluation["files"][0]["sha256"]}"'
    assert answer.headers["Content-Type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


def tiles(grid: Image.Image, *, row: int, seeds: int, after: bool, heading: int) -> list[bytes]:
    """The pictures of a row, which lies under so many headings."""
    left = MARGIN + LABEL + (seeds * (TILE + GAP) - GAP + SPLIT if after else 0)
    top = 78 + 40 * heading + row * (TILE + GAP)
    boxes = [(left + i * (TILE + GAP), top) for i in range(seeds)]
    return [grid.crop((x, y, x + TILE, y + TILE)).tobytes() for x, y in boxes]


def test_draws_the_base_and_the_version_at_the_same_seeds(version: Service) -> None:
    found = drawn(version)
    assert (found["state"], found["kind"], found["version"]) == ("ready", "preview", "v1")
    assert found["report"] == {"prompts": ["a photo of cat"], "controls": ["a photo of sea"], "seeds": [3, 4]}
    grid = grid_of(version, found)
    before, after = (tiles(grid, row=0, seeds=2, after=after, heading=1) for after in (False, True))
    assert all(one != other for one, other in zip(before, after, strict=True))  # the edit shows
    pipeline = version.runner.context.pipelines.get(version.model.id)
    picture = editing.draw_pictures(pipeline, ["a photo of cat"] * 2, seeds=[3, 4], num_inference_steps=2)[0]
    assert picture.resize((TILE, TILE), Image.Resampling.LANCZOS).tobytes() == before[0]  # and the model is as it was


def test_same_request_same_picture(version: Service) -> None:
    assert drawn(version)["files"] == drawn(version)["files"]


def test_draws_each_edit_by_default(version: Service) -> None:
    assert drawn(version, prompts=None, controls=[])["report"]["prompts"] == ["a photo of cat"]


def test_tells_who_asked(version: Service) -> None:
    found = drawn(version)
    with version.sessions() as session:
        events = {event.action: event for event in session.query(AuditEvent) if event.action.startswith("evaluation")}
    assert list(events) == ["evaluation.preview", "evaluation.ready"]
    assert {event.target for event in events.values()} == {"checkpoint:tiny/v1"}
    assert events["evaluation.preview"].details["evaluation"] == found["id"]
    assert version.get(f"{EVALUATIONS}?kind=preview")["items"] == [found]


def test_cancels_what_waits(version: Service) -> None:
    location = ask(version, **QUICK).headers["Location"]
    answer = version.client.post(f"{location}/cancel", headers=version.keys["apply"])
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    assert not version.runner.work()
    assert version.client.post(f"{location}/cancel", headers=version.keys["apply"]).json()["state"] == "cancelled"


def test_cancels_what_is_drawn(version: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    location = ask(version, **QUICK).headers["Location"]
    draw = editing.draw_pictures

    def cancel_first(*arguments: Any, **options: Any) -> Any:
        assert version.get(location)["state"] == "running"
        version.client.post(f"{location}/cancel", headers=version.keys["apply"])
        monkeypatch.setattr(version.runner.heartbeat, "is_cancelled", lambda lease: True)
        return draw(*arguments, **options)

    monkeypatch.setattr("editing.pictures.comparison.draw_pictures", cancel_first)
    assert version.runner.work()
    assert version.get(location)["state"] == "cancelled"
    ended = version.client.post(f"{location}/cancel", headers=version.keys["apply"])
    assert ended.json()["state"] == "cancelled"


def test_ready_is_not_cancelled(version: Service) -> None:
    found = drawn(version)
    answer = version.client.post(f"{EVALUATIONS}/{found['id']}/cancel", headers=version.keys["apply"])
    assert (answer.status_code, answer.json()["title"]) == (409, "Evaluation already finished")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"prompts": []}, "/prompts"),
        ({"prompts": ["x" * 1001]}, "/prompts/0"),
        ({"prompts": ["a\0b"]}, "/prompts/0"),
        ({"controls": [""]}, "/controls/0"),
        ({"seeds": [-1]}, "/seeds/0"),
        ({"num_inference_steps": 0}, "/num_inference_steps"),
        ({"guidance_scale": "much"}, "/guidance_scale"),
        ({"prompts": ["a cat"] * 60, "seeds": [1, 2, 3, 4]}, ""),
        ({"prompt": "a cat"}, "/prompt"),
    ],
)
def test_refuses_what_cannot_be_drawn(version: Service, body: dict[str, Any], pointer: str) -> None:
    errors = ask(version, expected=422, **body).json()["errors"]
    assert pointer in [error["pointer"] for error in errors]


def test_refuses_what_is_not_there(version: Service) -> None:
    read, missing = version.keys["read"], uuid4()
    client = version.client
    assert client.get(f"{EVALUATIONS}/{missing}", headers=read).json()["title"] == "Evaluation not found"
    found = drawn(version)
    answer = client.get(f"{EVALUATIONS}/{found['id']}/files/other.png", headers=read)
    assert (answer.status_code, answer.json()["title"]) == (404, "Evaluation file not found")
    assert "before-after.png" in answer.json()["detail"]
    other = PREVIEWS.replace("v1", "v1", 1).replace("checkpoints/v1", "checkpoints/v7")
    assert client.post(other, json=QUICK, headers=version.keys["apply"]).status_code == 404
    assert client.post(PREVIEWS, json=QUICK, headers=read).status_code == 403


def test_refuses_an_unpublished_version(version: Service) -> None:
    with version.sessions() as session:
        session.query(Checkpoint).one().state = "failed"
        session.commit()
    assert ask(version, expected=409, **QUICK).json()["title"] == "Checkpoint not published"
    with version.sessions() as session:
        assert session.query(Job).filter(Job.kind == "evaluate_checkpoint").count() == 0
