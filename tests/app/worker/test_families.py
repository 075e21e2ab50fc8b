"""Pipelines with T5 and LLM text encoders through the whole service, from their registration to diffusers' loader."""

import io
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import editing
from app.db.engine import Sessions
from app.db.models import Edit
from app.storage.local import LocalStore
from app.worker.edits import concept_edit
from editing.encoders.base import TextEncoder
from editing.encoders.load import load_encoder
from editing.families.registry import FAMILIES
from editing.uce import projections
from editing.weights import PREFIX
from tests.app.checkpoints.test_cross_attention import pull
from tests.app.worker.conftest import Service
from tests.editing.test_conformance import encode_with_diffusers
from tests.families import TEXTS
from tests.generators import write_whole_pipeline

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
CAPTIONS = [f"{color} {thing}" for color in ("red", "blue", "pale", "my") for thing in ("fox", "oak", "jug", "wasp")]
PROMPT = "a photo of a cat"
UCE = {"method": "text_projection", "regularization_weight": 0.1}
QUICK = {"objective": "text", "optimization_steps": 10}
NOISE = {"objective": "noise", "optimization_steps": 2, "num_images": 1, "num_inference_steps": 2, "noise_pool_size": 2}


SLOW = ("pixart_sigma", "flux", "sd3", "auraflow", "qwen_image", "lumina2")  # with z_image, every kind of encoder


@pytest.fixture(scope="module", params=["z_image", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, roots: Path) -> Iterator[Path]:
    """A pipeline of the family in the model roots, with its weights in several files."""
    folder = write_whole_pipeline(roots / family, family, shard_size="30kB")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def model(service: Service, family: str, folder: Path) -> Any:
    """Registered and measured."""
    service.post("/v1/models", {"name": family, "source": folder.name}, status=202)
    service.work()
    model = service.get(f"/v1/models/{family}")
    assert model["state"] == "ready", model["problem"]
    return model


def edit(service: Service, model: Any, **body: Any) -> None:
    """Request an edit and let the worker optimize it."""
    made = service.post(f"/v1/models/{model['name']}/edits", {"settings": QUICK, **body}, status=202)
    service.work()
    found = service.get(f"/v1/edits/{made['id']}")
    assert found["state"] == "ready", found["problem"]


def apply(service: Service, model: Any, **body: Any) -> Any:
    """Apply all edits as the dry run says, and return the published checkpoint."""
    path = f"/v1/models/{model['name']}"
    plan = service.post(f"{path}/apply", {"edits": "ready", "dry_run": True, **body}, status=200)
    service.post(f"{path}/apply", {"edits": "ready", **body}, status=202)
    service.work()
    made = service.get(f"{path}/checkpoints/v1")
    assert made["state"] == "published", made["problem"]
    assert [each["method"] for each in made["edits"]] == [each["method"] for each in plan["edits"]]
    assert (made["layers"], made["text_projection"]) == (plan["layers"], plan["text_projection"])
    return made


def picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 24), (200, 40, 10)).save(content, format="PNG")
    return content.getvalue()


def read_edits(service: Service, factory: Sessions, store: LocalStore) -> list[tuple[Edit, editing.ConceptEdit]]:
    """Return the edits in the order in which a checkpoint has them."""
    with factory() as session:
        rows = session.query(Edit).order_by(Edit.id).all()
        for row in rows:
            assert row.value is not None
        return [(row, concept_edit(row, store=store)) for row in rows]


def check_files(folder: Path, pulled: Path, made: Any, *, changed: set[str]) -> None:
    """The tensors that differ from the base are those of these keys; every other file is the base's."""
    own = {file["path"] for file in made["files"]}
    differing: set[str] = set()
    for path in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        if path in own and path.endswith(".safetensors"):
            before, after = (load_file(root / path) for root in (folder, pulled))
            base = {key.removeprefix(PREFIX): tensor for key, tensor in before.items()}
            assert base.keys() == {key.removeprefix(PREFIX) for key in after}
            differing |= {key for key in after if not torch.equal(base[key.removeprefix(PREFIX)], after[key])}
        elif (folder / path).read_bytes() != (pulled / path).read_bytes():
            differing.add(path)
    assert differing == changed


def encode(folder: Path, family: str, prompt: str = PROMPT) -> Any:
    """Return the condition that diffusers' pipeline of the folder makes of a prompt, and that pipeline."""
    loaded = DiffusionPipeline.from_pretrained(folder)
    return encode_with_diffusers(loaded, [prompt], tiny=TEXTS[family], negative=False), loaded


@contextmanager
def without_pipeline(service: Service) -> Iterator[dict[str, int]]:
    """Drop the worker's pipeline and refuse to load one. Yield the number of blocks of each encoder that is loaded."""
    blocks: dict[str, int] = {}

    def load(*arguments: Any, **options: Any) -> TextEncoder:
        encoder = load_encoder(*arguments, **options)
        blocks[encoder.name] = len(encoder.blocks)
        return encoder

    service.runner.context.pipelines._pipeline = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editing, "load_pipeline", lambda *_, **__: pytest.fail("the whole pipeline is loaded"))
        patch.setattr(editing, "load_encoder", load)
        yield blocks


def test_registration_describes_the_model(model: Any, family: str) -> None:
    assert (model["family"], model["methods"]) == (family, ["text_encoder", "text_projection"])
    assert [each["name"] for each in model["encoders"]] == [spec.name for spec in FAMILIES[family].encoders]


def test_prompts_are_checked_as_inference_reads_them(service: Service, model: Any, family: str) -> None:
    """The limit is that of the family's longest encoder, and each encoder must see the subject."""
    if family in ("flux", "qwen_image"):
        pytest.skip("no template is longer than its tokens")
    filler = "é" * 400 if family == "z_image" else "x " * 240  # a token for each byte, or for each character
    for template, expected in (
        (filler + "{}", "the subject is lost to truncation"),
        ("{}" + filler, "tokens that the model reads: shorten it"),
    ):
        body = {"source": "cat", "destination": {"prompt": "dog"}, "templates": [template]}
        found = service.post(f"/v1/models/{family}/edits", body, status=422)
        assert [error["pointer"] for error in found["errors"]] == ["/templates/0"]
        assert expected in found["errors"][0]["detail"]


def test_settings_of_sampling_default_to_those_of_the_family(service: Service, model: Any, family: str) -> None:
    path, expected = f"/v1/models/{family}", FAMILIES[family]
    made = service.post(f"{path}/edits", {"source": "cat", "destination": {"prompt": "dog"}}, status=202)
    assert made["settings"]["num_inference_steps"] == expected.num_inference_steps
    assert made["settings"]["guidance_scale"] == expected.guidance_scale
    edits = [{"source": "cat", "destination": {"prompt": "dog"}, "settings": {"guidance_scale": 0}}]
    (made,) = service.post(f"{path}/edits/batch", edits, status=202)["edits"]
    settings = service.get(f"/v1/edits/{made['id']}")["settings"]
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (expected.num_inference_steps, 0)


def test_edits_of_the_text_projection_are_published(
    service: Service, model: Any, factory: Sessions, store: LocalStore, folder: Path, family: str, tmp_path: Path
) -> None:
    edit(service, model, source="cat", destination={"prompt": "dog"})
    edit(service, model, source="small boat", destination={"erase": True})
    made = apply(service, model, **UCE, preserve=["a red fox"])
    assert made["text_projection"]["regularization_weight"] == 0.1
    (changed,) = made["changed_projections"]
    pulled = pull(service, tmp_path / "pulled", name=family)
    check_files(folder, pulled, made, changed={changed["tensor"]})
    card = (pulled / "README.md").read_text()
    assert f"written into the text projection of the transformer of {family}" in card.replace("\\", "")

    pipeline = service.runner.context.pipelines.get(model["id"])
    edits = [concept for _, concept in read_edits(service, factory, store)]
    update = editing.compute_projection_update(pipeline, edits, preserve=["a red fox"], regularization_weight=0.1)
    before, after = encode(folder, family), encode(pulled, family)
    name = changed["tensor"].removesuffix(".weight")
    with torch.no_grad(), projections.apply_temporarily(pipeline.generator, update):
        states = pipeline.generator.normalize_text(pipeline.encode([PROMPT]).states)
        expected = pipeline.generator.network.get_submodule(name)(states)
        (told, _), (unedited, _) = (
            (loaded.transformer.get_submodule(name)(pipeline.generator.normalize_text(condition.states)), condition)
            for condition, loaded in (after, before)
        )
    torch.testing.assert_close(told, expected, **EXACT)
    assert (told - unedited).norm() > 0.003 * unedited.norm()


def test_edits_of_the_text_encoders_are_published(
    service: Service, model: Any, factory: Sessions, store: LocalStore, folder: Path, family: str, tmp_path: Path
) -> None:
    service.post(f"/v1/models/{family}/statistics", {"captions": CAPTIONS}, status=202)
    with without_pipeline(service) as measured:
        service.work()
    edit(service, model, source="cat", destination={"prompt": "dog"})
    edit(service, model, source="small boat", destination={"erase": True})
    edit(service, model, source="old tree", destination={"balance": {"the sea": 1, "red hat": 3}})
    files = {"file": ("a.png", picture(), "image/png")}
    image = service.client.post("/v1/images", headers=service.keys["edit"], files=files).json()["id"]
    edit(service, model, source="red hat", destination={"images": [image]}, settings=NOISE)
    with without_pipeline(service) as edited:
        made = apply(service, model)
    pulled = pull(service, tmp_path / "pulled", name=family)
    pipeline = service.runner.context.pipelines.get(model["id"])
    layers = [(encoder.name, layer) for encoder in pipeline.encoders for layer in encoder.default_edited_layers]
    assert [(each["encoder"], each["layer"]) for each in made["changed_layers"]] == layers
    last = {encoder.name: encoder.value_layer for encoder in pipeline.encoders}
    assert measured == edited == {name: layer + 1 for name, layer in last.items()}
    card = (pulled / "README.md").read_text()
    for spec in FAMILIES[family].encoders:
        assert f'.from_pretrained("FOLDER", subfolder="{spec.name}")' in card
        assert (f"pipeline.{spec.name}.load_adapter" in card) == (spec.kind != "clip")
    difference = service.get(f"/v1/models/{family}/checkpoints/v1/difference?against=base")
    assert sorted((each["path"].partition("/")[0], each["layer"]) for each in difference["layers"]) == sorted(layers)
    check_files(folder, pulled, made, changed={each["tensor"] for each in difference["layers"]})

    request = {"prompts": [PROMPT], "seeds": [0], "num_inference_steps": 2}
    preview = service.post(f"/v1/models/{family}/checkpoints/v1/previews", request, status=202)
    assert preview["request"]["guidance_scale"] == FAMILIES[family].guidance_scale
    service.work()
    drawn = service.get(f"/v1/models/{family}/checkpoints/v1/evaluations/{preview['id']}")
    assert (drawn["state"], [file["path"] for file in drawn["files"]]) == ("ready", ["before-after.png"])

    with _edited(pipeline, service, model, factory, store):
        expected = pipeline.encode([PROMPT])
    (told, _), (unedited, _) = encode(pulled, family), encode(folder, family)
    for ours, theirs, before in zip(expected.tensors, told.tensors, unedited.tensors, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(theirs, ours, **EXACT)
            assert (ours - before).norm() > 0.003 * before.norm()


@contextmanager
def _edited(pipeline: Any, service: Service, model: Any, factory: Sessions, store: LocalStore) -> Iterator[None]:
    """Apply the edits' own values by the library, with the statistics of the model."""
    digest = service.get(f"/v1/models/{model['name']}")["statistics"]["digest"]
    moments = editing.SecondMoments.load(store.fetch(digest))
    rows, edits = zip(*read_edits(service, factory, store), strict=True)
    values = [editing.EditValue.from_safetensors(row.value.content) for row in rows]
    with ExitStack() as stack:
        for encoder in pipeline.encoders:
            update = editing.compute_update(encoder, edits, values, moments)
            stack.enter_context(editing.apply_temporarily(encoder, update))
        yield
