"""Published versions of the emoji model, judged by its classifier: through the service, with real edits."""

import io
import json
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import Engine

from app.db.engine import sessions
from app.db.models import Edit
from app.jobs.enqueue import enqueue_many
from app.jobs.kinds import OPTIMIZE_EDIT
from app.main import create_app
from app.settings import Settings
from app.storage.local import LocalStore
from app.worker.runner import Runner
from app.worker.tasks import evaluate_checkpoint
from demo.concepts import WEIGHTS
from tests.app.checkpoints.conftest import Service, register_folder
from tests.app.conftest import issue_keys

pytestmark = pytest.mark.slow

SUITED = {"objective": "text", "optimization_steps": 150, "guidance_scale": 3.0, "num_inference_steps": 8}


@pytest.fixture
def emoji(settings: Settings, clean_database: Engine) -> Iterator[Service]:
    store = LocalStore(settings.store_dir)
    factory = sessions(clean_database)
    with factory() as session:
        keys = issue_keys(session)
        model = register_folder(session, store, WEIGHTS / "pipeline", name="emoji")
        model.classifier = "emoji"
        session.commit()
    settings = settings.model_copy(update={"torch_threads": 1, "device": "cpu"})
    runner = Runner(settings=settings, sessions=factory, store=store, worker="test", stopping=threading.Event())
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield Service(client, keys, factory, store, settings, runner, model)


def edit(service: Service, source: str, **columns: Any) -> UUID:
    """An edit with its real value."""
    given = {"destination": {"prompt": "robot"}, "templates": ["an image of {}", "{}"], "settings": SUITED}
    with service.sessions() as session:
        row = Edit(model_id=service.model.id, source=source, created_by="test", **(given | columns))
        session.add(row)
        session.flush()
        enqueue_many(session, kind=OPTIMIZE_EDIT, actor="test", target_ids=[row.id])
        session.commit()
        return row.id


def judged(service: Service, **apply: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The version and its check."""
    made = service.apply(**apply)
    (check,) = service.get(f"/v1/models/emoji/checkpoints/{made['version']}/evaluations?kind=check")["items"]
    assert check["state"] == "ready", check["problem"]
    return service.get(f"/v1/models/emoji/checkpoints/{made['version']}"), check


def test_a_check_draws_the_edits_of_which_most_is_left(emoji: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_checkpoint, "CHECKED", 1)
    ids = [str(edit(emoji, source)) for source in ("dog", "car", "rose")]
    while emoji.runner.work():
        pass
    made, check = judged(emoji, edits=ids)
    (drawn,) = check["report"]["edits"]
    assert drawn["relative_residual"] == max(one["relative_residual"] for one in made["edits"])
    assert {one["edit"] for one in check["report"]["not_evaluated"]} == set(ids) - {drawn["edit"]}
    assert check["report"]["scores"]["s2d_template"] is None


def test_every_apply_is_checked(emoji: Service) -> None:
    """An edit that takes, an erasure, one of no known class; then the same by an update that writes nothing."""
    dog = str(edit(emoji, "dog"))
    pizza = str(edit(emoji, "pizza", destination={"erase": True, "neutral": "car"}))
    other = str(edit(emoji, "hammer", destination={"prompt": "a thing of no class"}))
    while emoji.runner.work():
        pass
    made, check = judged(emoji, edits=[dog, pizza, other])
    assert made["warnings"] == []
    report = check["report"]
    verdicts = {verdict["edit"]: verdict for verdict in report["edits"]}
    assert verdicts.keys() == {dog, pizza}
    assert (verdicts[dog]["source"], verdicts[dog]["destination"], verdicts[dog]["succeeded"]) == ("dog", "robot", True)
    assert verdicts[dog]["before"] < 0.1 < 0.8 < verdicts[dog]["after"]
    assert verdicts[pizza]["before"] > 0.8 > 0.1 > verdicts[pizza]["after"]
    assert report["not_evaluated"] == [
        {"edit": other, "source": "hammer", "reason": "the classifier knows no class 'a thing of no class'"}
    ]
    assert report["scores"]["s2d"] > 0.7 and abs(report["scores"]["hd"]) < 0.05
    assert len(report["held_out"]) == 30 and not {"dog", "pizza", "robot", "hammer"} & set(report["held_out"])
    assert check["files"] == []

    made, check = judged(emoji, edits=[dog, pizza], moment_weight=1e9)
    assert [verdict["succeeded"] for verdict in check["report"]["edits"]] == [False, False]
    details: dict[str, list[str]] = {warning["edit"]: [] for warning in made["warnings"]}
    for warning in made["warnings"]:
        details[warning["edit"]].append(warning["detail"])
    assert details.keys() == {dog, pizza}
    assert "hardly changed" in details[dog][0] and "recognized as 'robot' with confidence 0.0" in details[dog][1]
    assert "'pizza' is still recognized" in details[pizza][1]


def test_evaluation(emoji: Service) -> None:
    """Report, table and pictures; the same request twice gives the same bytes."""
    dog, cat = str(edit(emoji, "dog")), str(edit(emoji, "cat", destination={"prompt": "pizza"}))
    while emoji.runner.work():
        pass
    emoji.apply(edits=[dog, cat])
    body = {
        "held_out": ["car", "dog", "no class"],
        "guidance_scale": 3.0,
        "num_inference_steps": 8,
        "prompts": ["a small {}"],
    }
    body["scales"] = [1, 7]
    found = []
    for _ in range(2):
        path = "/v1/models/emoji/checkpoints/v1/evaluations"
        asked = emoji.client.post(path, json=body, headers=emoji.keys["apply"])
        assert asked.status_code == 202, asked.text
        assert emoji.runner.work()
        found.append(emoji.get(asked.headers["Location"]))
    first, again = found
    assert first["kind"] == "evaluation" and first["files"] == again["files"]
    files = {file["path"]: emoji.store.read(file["sha256"]) for file in first["files"]}
    assert sorted(files) == ["before-after.png", "report.json", "report.md", "scales.png"]
    assert Image.open(io.BytesIO(files["scales.png"])).size == (768, 480)
    (scale,) = first["report"]["scales"]
    assert scale["edits"] == 1 and scale["s2d"] > 0.7 and scale["hd"] == pytest.approx(0, abs=0.1)
    assert json.loads(files["report.json"]) == first["report"]
    assert first["report"]["held_out"] == ["car"]
    settings = first["report"]["settings"]
    assert (settings["sampler"], settings["guidance_scale"], settings["classifier"]) == (
        "DPMSolverMultistepScheduler",
        3.0,
        "emoji",
    )
    text = files["report.md"].decode()
    assert "| dog | robot |" in text and "safety filter" in text and "Held out: car." in text


def test_without_a_classifier(emoji: Service) -> None:
    with emoji.sessions() as session:
        session.get_one(type(emoji.model), emoji.model.id).classifier = None
        session.commit()
    dog = str(edit(emoji, "dog"))
    while emoji.runner.work():
        pass
    emoji.apply(edits=[dog])
    path = "/v1/models/emoji/checkpoints/v1/evaluations"
    assert emoji.get(path)["items"] == []
    answer = emoji.client.post(path, json={}, headers=emoji.keys["apply"])
    assert (answer.status_code, answer.json()["title"]) == (409, "Classifier missing")
    for body, pointer in (({"prompts": ["a cat"]}, "/prompts/0"), ({"seed": -1}, "/seed"), ({"x": 1}, "/x")):
        errors = emoji.client.post(path, json=body, headers=emoji.keys["apply"]).json()["errors"]
        assert [error["pointer"] for error in errors] == [pointer]
