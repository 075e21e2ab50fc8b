"""A pipeline with two text encoders through the whole service: registered, measured, edited, applied, loaded."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load
from torch import Tensor

import editing
from app.db.engine import Sessions
from app.db.models import AuditEvent, Edit, EditValue, Model
from app.jobs.enqueue import enqueue
from app.jobs.kinds import REGISTER_MODEL
from app.models.tokenizers import tokenizers_of
from app.settings import Settings
from app.storage.local import LocalStore
from app.worker.edits import concept_edit
from app.worker.runner import Runner
from tests.app.worker.conftest import Service
from tests.pipelines import LAYERS_1, LAYERS_2, MLP_WIDTH, WIDTH, WIDTH_2, write_pipeline

CAPTIONS = [
    f"{color} {thing}" for color in ("red", "blue", "pale", "my", "5") for thing in ("fox", "oak", "jug", "wasp")
]
PROMPT = "a photo of a cat!"
LAYERS = {"text_encoder": [1, 2, 3], "text_encoder_2": [1, 2, 3, 4, 5]}


@pytest.fixture(scope="module")
def folder(roots: Path) -> Path:
    """A pipeline of the SDXL family in the model roots."""
    return write_pipeline(roots / "xl", family="sdxl")


@pytest.fixture
def model(service: Service, add_model: Any, factory: Sessions, folder: Path) -> Model:
    """Registered by its job."""
    row: Model = add_model("xl")
    with factory() as session:
        enqueue(session, kind=REGISTER_MODEL, target_id=row.id, actor="test")
        session.commit()
    service.work()
    return row


def told(pipeline: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """The states and the pooled output that diffusers' pipeline gives its U-Net."""
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return states, pooled


def test_an_edit_is_optimized_applied_and_published(
    service: Service, model: Model, factory: Sessions, store: LocalStore, folder: Path, tmp_path: Path
) -> None:
    service.post("/v1/models/xl/statistics", {"captions": CAPTIONS}, status=202)
    service.work()
    described = service.get("/v1/models/xl")
    assert (described["state"], described["family"]) == ("ready", "sdxl")
    assert [(e["name"], e["layers"]) for e in described["encoders"]] == [
        ("text_encoder", LAYERS_1),
        ("text_encoder_2", LAYERS_2),
    ]
    moments = editing.SecondMoments.load(store.fetch(described["statistics"]["digest"]))
    assert {each.encoder: list(each.moments) for each in moments.per_encoder} == LAYERS

    asked = {
        "source": "cat!",
        "destination": {"prompt": "dog"},
        "settings": {"objective": "text", "optimization_steps": 10},
    }
    edit = service.post("/v1/models/xl/edits", asked, status=202)
    service.work()
    encoders = service.get(f"/v1/edits/{edit['id']}")["value"]["encoders"]
    assert [(own["name"], own["layer"]) for own in encoders] == [("text_encoder", 3), ("text_encoder_2", 5)]
    file = service.client.get(f"/v1/edits/{edit['id']}/value", headers=service.keys["read"])
    assert {key: len(tensor) for key, tensor in load(file.content).items()} == {
        "text_encoder.delta": WIDTH,
        "text_encoder.hidden": WIDTH,
        "text_encoder_2.delta": WIDTH_2,
        "text_encoder_2.hidden": WIDTH_2,
    }

    service.post("/v1/models/xl/apply", {"edits": "ready", "alpha": 0.6}, status=202)
    service.work()
    made = service.get("/v1/models/xl/checkpoints/v1")
    assert made["state"] == "published", made["problem"]
    assert [(layer["encoder"], layer["layer"]) for layer in made["changed_layers"]] == [
        (encoder, layer) for encoder, layers in LAYERS.items() for layer in layers
    ]
    files = {entry["path"]: entry["sha256"] for entry in made["files"]}
    assert json.loads(store.read(files["manifest.json"]))["settings"]["layers"] == LAYERS
    assert "layers 1 to 3 and 1 to 5" in store.read(files["README.md"]).decode()
    difference = service.get("/v1/models/xl/checkpoints/v1/difference?against=base")
    assert {(layer["path"].partition("/")[0], layer["layer"]) for layer in difference["layers"]} == {
        (encoder, layer) for encoder, layers in LAYERS.items() for layer in layers
    }

    edited = shutil.copytree(folder, tmp_path / "edited")
    for path, sha256 in files.items():
        (edited / path).parent.mkdir(exist_ok=True)
        (edited / path).write_bytes(store.read(sha256))
    base = StableDiffusionXLPipeline.from_pretrained(folder)
    before = told(base, PROMPT)
    after = told(StableDiffusionXLPipeline.from_pretrained(edited), PROMPT)
    expected = _by_the_library(service.runner, model, edit["id"], factory, store, moments)
    base.load_lora_weights(edited / "adapters", weight_name="lora.safetensors")
    for ours, theirs, adapted, then in zip(expected, after, told(base, PROMPT), before, strict=True):
        assert (ours - then).norm() > 0.003 * then.norm()
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapted, ours, rtol=1e-4, atol=1e-5)


def _by_the_library(
    runner: Runner, model: Model, edit_id: str, factory: Sessions, store: LocalStore, moments: editing.SecondMoments
) -> tuple[Tensor, ...]:
    """What the U-Net is told with the same edit's own values applied by hand."""
    pipeline = runner.context.pipelines.get(model.id)
    with factory() as session:
        row = session.get_one(Edit, edit_id)
        edit = concept_edit(row, store=store)
    (value,) = editing.optimize_values(pipeline, [edit])
    assert isinstance(value, editing.EditValue)
    with ExitStack() as stack:
        for encoder in pipeline.encoders:
            update = editing.compute_update(encoder, [edit], [value], moments, alpha=0.6)
            stack.enter_context(editing.apply_temporarily(encoder, update))
        return pipeline.encode([PROMPT]).tensors


def test_one_value_contains_both_encoders(
    service: Service, model: Model, add_edits: Any, edit: Any, factory: Sessions
) -> None:
    (job_id,) = add_edits(model, {})
    service.work()
    row: EditValue = edit(job_id).value
    value = editing.EditValue.from_safetensors(row.content)
    assert {name: len(own.delta) for name, own in value.encoders.items()} == {
        "text_encoder": WIDTH,
        "text_encoder_2": WIDTH_2,
    }
    with factory() as session:
        last = session.query(AuditEvent).order_by(AuditEvent.sequence.desc()).first()
        assert last is not None
        assert last.details["value"] == row.sha256


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        (
            "edits",
            {"source": "cat", "destination": {"prompt": "dog"}, "settings": {"layer": 1}},
            "/settings/layer",
        ),
        ("apply", {"edits": "ready", "layers": [1, 2]}, "/layers"),
    ],
)
def test_one_layer_for_both_encoders_is_rejected(
    service: Service, model: Model, add_edits: Any, path: str, body: object, pointer: str
) -> None:
    add_edits(model, {})
    service.work()
    problem = service.post(f"/v1/models/xl/{path}", body, status=422)
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


def test_both_tokenizers_check_the_prompt(
    model: Model, factory: Sessions, store: LocalStore, settings: Settings
) -> None:
    with factory() as session:
        first, second = tokenizers_of(session, model_id=model.id, store=store, folder=settings.data_dir)
    assert (first.pad_id, second.pad_id) == (first.eos_id, 0)


def test_shipped_moments_must_be_of_both_encoders(
    service: Service, folder: Path, roots: Path, add_model: Any, factory: Sessions
) -> None:
    copied = shutil.copytree(folder, roots / "half")
    moment = torch.eye(MLP_WIDTH, dtype=torch.float64)
    editing.SecondMoments({3: moment}, captions=1, tokens=1).save(copied / "second_moments.safetensors")
    row = add_model("half")
    with factory() as session:
        enqueue(session, kind=REGISTER_MODEL, target_id=row.id, actor="test")
        session.commit()
    service.work()
    described = service.get("/v1/models/half")
    shutil.rmtree(copied)
    assert described["state"] == "failed" and "text_encoder_2" in described["problem"]["detail"]
