"""Edits written into the U-Net's cross-attention: what apply refuses, what is published, and what it draws."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from fastapi.testclient import TestClient
from safetensors.torch import load, load_file
from sqlalchemy.orm import Session

from app.checkpoints.files import merge_files
from app.db.models import Edit, Model, Statistics
from demo.classify import classify, load_classifier
from demo.concepts import WEIGHTS
from editing.files import File
from editing.pictures.draw import draw_pictures
from editing.pipelines import load_pipeline
from tests.app.checkpoints.conftest import Service, ready_edit, register_folder
from tests.app.conftest import Headers

URL = "/v1/models/emoji/apply"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
CROSS = {"method": "cross_attention"}


def digests(checkpoint: Any) -> Any:
    """The SHA-256 of each file, without the signature, which differs each time."""
    return {file["path"]: file["sha256"] for file in checkpoint["files"] if file["path"] != "model.sig"}


def pull(service: Any, folder: Path, *, name: str = "tiny", revision: str = "main") -> Path:
    """Every file of a revision, as the Hub's clients get them."""
    listed = service.get(f"/api/models/emender/{name}/revision/{revision}")
    for path in (sibling["rfilename"] for sibling in listed["siblings"]):
        answer = service.client.get(f"/emender/{name}/resolve/{revision}/{path}", headers=service.keys["read"])
        assert answer.status_code == 200, answer.text
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(answer.content)
    return folder


@pytest.mark.usefixtures("model")
class TestRefused:
    def pointers(self, client: TestClient, keys: Any, body: Any) -> Any:
        answer = client.post(URL, json=body, headers=keys["apply"])
        assert answer.status_code == 422, answer.text
        return {error["pointer"]: error["detail"] for error in answer.json()["errors"]}

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"alpha": 0.5}, ["/alpha"]),
            ({"layers": [2], "moment_weight": 10.0}, ["/layers", "/moment_weight"]),
            ({"residual_schedule": "spread"}, ["/residual_schedule"]),
            ({"contexts": "many"}, ["/contexts"]),
            ({"preset": "published"}, ["/preset"]),
        ],
    )
    def test_settings_of_the_memory(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        add_edit: Callable[..., Edit],
        given: dict[str, Any],
        expected: Any,
    ) -> None:
        add_edit("fox")
        found = self.pointers(client, keys, {"edits": "ready", **CROSS, **given})
        assert list(found) == expected
        assert all("'text_encoder'" in detail and "`regularization_weight`" in detail for detail in found.values())

    @pytest.mark.parametrize("name", ["erase_scale", "preserve_scale", "regularization_weight"])
    def test_settings_of_cross_attention(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], name: str
    ) -> None:
        add_edit("fox")
        assert list(self.pointers(client, keys, {"edits": "ready", name: 1.0})) == [f"/{name}"]

    @pytest.mark.parametrize(
        "given", [{"regularization_weight": 0}, {"erase_scale": 0}, {"preserve_scale": -1}, {"method": "other"}]
    )
    def test_values_out_of_bounds(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], given: dict[str, Any]
    ) -> None:
        add_edit("fox")
        assert list(self.pointers(client, keys, {"edits": "ready", **CROSS, **given})) == [f"/{name}" for name in given]

    @pytest.mark.parametrize(
        ("family", "method", "expected"),
        [
            ("sd1", "text_projection", "A StableDiffusionPipeline has no transformer. Use one of its methods: "),
            ("z_image", "cross_attention", "A ZImagePipeline has no U-Net. Use one of its methods: "),
        ],
    )
    def test_methods_of_other_families(
        self,
        client: TestClient,
        keys: Mapping[str, Headers],
        add_edit: Callable[..., Edit],
        model: Model,
        session: Session,
        family: str,
        method: str,
        expected: str,
    ) -> None:
        add_edit("fox")
        model.family = family
        session.commit()
        (found,) = self.pointers(client, keys, {"edits": "ready", "method": method}).items()
        assert found[0] == "/method" and found[1].startswith(expected)

    def test_reference_images(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        ids = [str(add_edit("fox").id), str(add_edit("owl", destination={"images": ["sha256:" + "0" * 64]}).id)]
        (found,) = self.pointers(client, keys, {"edits": ids, **CROSS}).items()
        assert found[0] == "/edits/1" and "reference images" in found[1]

    def test_preserved_prompts_are_checked(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        add_edit("fox")
        assert list(self.pointers(client, keys, {"edits": "ready", **CROSS, "preserve": ["x" * 100]})) == [
            "/preserve/0"
        ]


@pytest.mark.usefixtures("model")
class TestAccepted:
    def test_needs_neither_statistics_nor_values_of_one_layer(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit]
    ) -> None:
        add_edit("fox")
        add_edit("owl", layer=1)
        answer = client.post(URL, json={"edits": "ready", **CROSS, "dry_run": True}, headers=keys["apply"])
        assert answer.status_code == 200, answer.text
        plan = answer.json()
        assert (plan["alpha"], plan["layers"], plan["statistics"]) == (None, [], None)
        assert plan["cross_attention"] == {
            "erase_scale": 1.0,
            "preserve_scale": 0.1,
            "regularization_weight": 0.5,
            "preserve": [],
        }
        assert [edit["method"] for edit in plan["edits"]] == ["cross_attention"] * 2
        made = client.post(URL, json={"edits": "ready", **CROSS, "regularization_weight": 2}, headers=keys["apply"])
        assert made.status_code == 202, made.text
        assert made.json()["cross_attention"]["regularization_weight"] == 2
        assert (made.json()["alpha"], made.json()["moment_weight"], made.json()["residual_schedule"]) == (
            None,
            None,
            None,
        )

    def test_an_edit_added_again_moves(
        self, client: TestClient, keys: Mapping[str, Headers], add_edit: Callable[..., Edit], statistics: Statistics
    ) -> None:
        fox, owl = add_edit("fox"), add_edit("owl")
        client.post(URL, json={"edits": "ready"}, headers=keys["apply"])
        made = client.post(URL, json={"from": "v1", "add": [str(owl.id)], **CROSS}, headers=keys["apply"]).json()
        methods = {edit["id"]: edit["method"] for edit in made["edits"]}
        assert methods == {str(fox.id): "text_encoder", str(owl.id): "cross_attention"}


class TestPublished:
    def test_only_the_unet_changed(self, service: Service, base_folder: Path, tmp_path: Path) -> None:
        service.edit("fox")
        service.edit("owl", destination={"erase": True})
        made = service.apply(edits="ready", **CROSS, preserve=["a red jug"], regularization_weight=0.2)
        assert made["state"] == "published", made["problem"]
        paths = ["README.md", "manifest.json", "model.sig", "unet/config.json", UNET]
        assert sorted(file["path"] for file in made["files"]) == paths
        assert all(0 < edit["relative_residual"] < 1 for edit in made["edits"])
        assert made["changed_layers"] == []
        names = [changed["tensor"] for changed in made["changed_projections"]]
        assert len(names) == 8

        pulled = pull(service, tmp_path / "pulled")
        before, after = load_file(base_folder / UNET), load_file(pulled / UNET)
        assert {key for key in before if not torch.equal(before[key], after[key])} == set(names)
        assert (pulled / TEXT_ENCODER).read_bytes() == (base_folder / TEXT_ENCODER).read_bytes()
        loaded = DiffusionPipeline.from_pretrained(pulled).unet.state_dict()
        assert all(torch.equal(loaded[name], after[name]) for name in names)

        found = service.get("/v1/models/tiny/checkpoints/v1/difference")
        assert {layer["path"] for layer in found["layers"]} == {UNET}
        told = {changed["tensor"]: changed["relative_norm"] for changed in made["changed_projections"]}
        assert {layer["tensor"]: layer["relative_norm"] for layer in found["layers"]} == pytest.approx(told, rel=1e-3)

    def test_manifest_and_card_say_so(self, service: Service) -> None:
        service.edit("fox")
        made = service.apply(edits="ready", **CROSS, preserve=["a red jug"])
        manifest = json.loads(service.store.read(digests(made)["manifest.json"]))
        assert manifest["settings"] == {
            "cross_attention": {
                "erase_scale": 1.0,
                "regularization_weight": 0.5,
                "preserve": ["a red jug"],
                "preserve_scale": 0.1,
            }
        }
        assert "statistics" not in manifest
        assert manifest["edits"][0]["method"] == "cross_attention" and "value" not in manifest["edits"][0]
        assert manifest["files"][UNET] == digests(made)[UNET]
        card = service.store.read(digests(made)["README.md"]).decode()
        assert "cross-attention of the U-Net of tiny" in card and "Only the U-Net was changed." in card
        assert "text encoder of tiny" not in card and "lora.safetensors" not in card
        assert "| fox | not fox |" in card and "cross-attention: erase_scale 1.0" in card and "a red jug" in card

    def test_beside_edits_of_the_memory(self, service: Service) -> None:
        """What is there already stays as it was written, whichever method adds to it."""
        fox, owl, elk = (str(service.edit(source)) for source in ("fox", "owl", "elk"))
        service.apply(edits=[fox], alpha=0.6, layers=[1, 2], preserve=["a jug"])
        mixed = service.apply(**{"from": "v1", "add": [owl]}, **CROSS, regularization_weight=0.2)
        assert mixed["state"] == "published", mixed["problem"]
        alone = service.get("/v1/models/tiny/checkpoints/v1")
        assert digests(mixed)[TEXT_ENCODER] == digests(alone)[TEXT_ENCODER]
        assert digests(mixed)["adapters/lora.safetensors"] == digests(alone)["adapters/lora.safetensors"]
        assert (mixed["alpha"], mixed["layers"], mixed["preserve"]) == (0.6, [1, 2], ["a jug"])
        assert mixed["statistics"] == alone["statistics"]
        assert {edit["id"]: edit["method"] for edit in mixed["edits"]} == {fox: "text_encoder", owl: "cross_attention"}
        card = service.store.read(digests(mixed)["README.md"]).decode()
        assert "Only the text encoder and the U-Net were changed." in card and "use `unet/` of this revision" in card

        more = service.apply(**{"from": "v2", "add": [elk]}, alpha=0.4)
        assert (more["alpha"], more["cross_attention"]) == (0.4, mixed["cross_attention"])
        assert {edit["id"]: edit["method"] for edit in more["edits"]}[owl] == "cross_attention"

        back = service.apply(**{"from": "v2", "remove": [owl]}, **CROSS)
        assert digests(back) == digests(alone) and back["commit"] == alone["commit"]
        without = service.get("/v1/models/tiny/checkpoints/v4/difference?against=v2")
        assert {layer["path"] for layer in without["layers"]} == {UNET}

    def test_reads_what_the_edited_text_encoder_tells(self, service: Service) -> None:
        """UCE's states are those after the memory's edits, so that the U-Net's edit fits what it will be told."""
        fox, owl = (str(service.edit(source)) for source in ("fox", "owl"))
        alone = service.apply(edits=[owl], **CROSS)
        service.apply(edits=[fox])
        mixed = service.apply(**{"from": "v2", "add": [owl]}, **CROSS)
        one, other = (load(service.store.read(digests(made)[UNET])) for made in (alone, mixed))
        assert any(not torch.equal(one[key], other[key]) for key in one)

    def test_same_set_same_bytes(self, service: Service) -> None:
        ids = [str(service.edit(source)) for source in ("fox", "owl", "elk")]
        first = service.apply(edits=ids, **CROSS, preserve=["a jug", "an oak"])
        again = service.apply(edits=ids[::-1], **CROSS, preserve=["a jug", "an oak"], notes="again")
        assert digests(first) == digests(again) and first["commit"] == again["commit"]


def test_no_unedited_variant_of_the_unet_is_served() -> None:
    paths = [UNET, "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json", TEXT_ENCODER]
    base = [File(path, "0" * 64, 1) for path in paths]
    served = merge_files(base, [File(UNET, "1" * 64, 1)])
    assert {path: file.sha256[0] for path, file in served.items()} == {
        UNET: "1",
        "unet/config.json": "0",
        TEXT_ENCODER: "0",
    }


def test_warns_of_an_edit_that_was_hardly_made(service: Service) -> None:
    """What holds it back is named, and a value that holds less."""
    fox = service.edit("fox")
    made = service.apply(edits=[str(fox)], **CROSS, regularization_weight=1e6)
    (warning,) = made["warnings"]
    assert warning["edit"] == str(fox)
    assert "lower `regularization_weight`, such as 100000" in warning["detail"]


@pytest.mark.slow
def test_the_emoji_model_draws_the_destination(service: Service, tmp_path: Path) -> None:
    """Pulled as the Hub's clients pull, loaded by diffusers, and read by the classifier."""
    if not (WEIGHTS / "pipeline" / "model_index.json").is_file():
        pytest.skip("the emoji model is not in demo/weights")
    with service.sessions() as session:
        model = register_folder(session, service.store, WEIGHTS / "pipeline", name="emoji")
        ready_edit(session, model, "pizza", width=160, layer=10, destination={"prompt": "hamburger"}, templates=["{}"])
        session.query(Statistics).filter_by(model_id=model.id).delete()  # neither they nor its value are needed
        session.commit()
        service.model = model
        made = service.apply(edits="ready", **CROSS, regularization_weight=100)
    assert made["state"] == "published", made["problem"]
    pulled = pull(service, tmp_path / "pulled", name="emoji", revision="v1")
    base, edited = load_pipeline(WEIGHTS / "pipeline"), load_pipeline(pulled)
    told = DiffusionPipeline.from_pretrained(pulled).unet.state_dict()
    assert all(torch.equal(told[name], tensor) for name, tensor in edited.generator.network.state_dict().items())
    classifier = load_classifier(WEIGHTS / "classifier.safetensors")
    prompts = ["a cute pizza", "a drawing of a pizza", "look at this pizza"]

    def confidence(pipeline: Any) -> float:
        read = classify(
            draw_pictures(pipeline, prompts, seeds=range(3), num_inference_steps=8, guidance_scale=3.0), classifier
        )
        return float(read.of_concept("hamburger").mean())

    assert confidence(base) < 0.1
    assert confidence(edited) > 0.8
