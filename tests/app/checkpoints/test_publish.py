"""From apply to a published version: what the files hold, and that they depend on nothing but the inputs."""

import base64
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from sqlalchemy import select

from app.checkpoints.files import merge_files
from app.checkpoints.manifest import compute_commit
from app.db.models import AuditEvent, EditValue, Model
from app.signing.keys import create_key, read_key
from app.storage.local import LocalStore
from editing.files import File
from editing.weights import read_base
from tests.app.checkpoints.conftest import Service

WEIGHTS = "text_encoder/model.safetensors"


def digests(checkpoint: Any) -> Any:
    """The SHA-256 of each file, without the signature, which differs each time."""
    return {file["path"]: file["sha256"] for file in checkpoint["files"] if file["path"] != "model.sig"}


def signature_of(checkpoint: Any) -> Any:
    return next((file["sha256"] for file in checkpoint["files"] if file["path"] == "model.sig"), None)


def card_data(service: Service, checkpoint: dict[str, Any]) -> Any:
    """The metadata of the model card."""
    from huggingface_hub import ModelCard

    return ModelCard(service.store.read(digests(checkpoint)["README.md"]).decode()).data


def signing_key_file(service: Service) -> Path:
    file = service.settings.signing_key_file
    assert isinstance(file, Path)
    return file


class TestPublished:
    def test_whole_checkpoint(self, service: Service, base_folder: Path) -> None:
        """State, files, residuals, conflicts, audit; only fc2 of the edited layers differs from the base."""
        ids = [service.edit("fox"), service.edit("owl", destination={"erase": True})]
        made = service.apply(edits="ready", alpha=0.6, layers=[1, 2], notes="first", alias="production")
        assert (made["version"], made["state"], made["edit_count"]) == ("v1", "published", 2)
        assert (made["alpha"], made["layers"], made["notes"], made["aliases"]) == (0.6, [1, 2], "first", ["production"])
        assert made["alias"]["moved"] is True
        assert [edit["id"] for edit in made["edits"]] == [str(edit_id) for edit_id in ids]
        assert all(0 <= edit["relative_residual"] < 1 for edit in made["edits"])
        assert [layer["layer"] for layer in made["changed_layers"]] == [1, 2]
        assert sorted(file["path"] for file in made["files"]) == [
            "README.md",
            "adapters/lora.safetensors",
            "manifest.json",
            "model.sig",
            "text_encoder/config.json",
            WEIGHTS,
        ]
        assert re.fullmatch(r"[0-9a-f]{40}", made["commit"])
        for file in made["files"]:
            assert len(service.store.read(file["sha256"])) == file["size"]

        before = read_base(base_folder / WEIGHTS)
        after = load(service.store.read(digests(made)[WEIGHTS]))
        assert before.keys() == after.keys() and all(key.startswith("text_model.") for key in after)
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        assert changed == {f"text_model.encoder.layers.{layer}.mlp.fc2.weight" for layer in (1, 2)}
        with service.sessions() as session:
            actions = session.scalars(select(AuditEvent.action).order_by(AuditEvent.sequence)).all()
        assert actions[-4:] == ["checkpoint.apply", "signing_key.first_use", "alias.move", "checkpoint.published"]

    def test_warns_of_an_edit_that_did_not_take(self, service: Service) -> None:
        fox = str(service.edit("fox"))
        resisting, taken = service.apply(edits=[fox], moment_weight=1e9), service.apply(edits=[fox], moment_weight=1)
        assert resisting["edits"][0]["relative_residual"] > 0.9
        assert [warning["edit"] for warning in resisting["warnings"]] == [fox]
        assert "'fox' hardly changed" in resisting["warnings"][0]["detail"]
        assert "1e+08" in resisting["warnings"][0]["detail"]
        assert taken["edits"][0]["relative_residual"] < 0.1
        assert taken["warnings"] == []

    def test_manifest_names_every_input(self, service: Service) -> None:
        edit = service.edit("fox")
        made = service.apply(edits=[str(edit)], preserve=["a red fox"])
        manifest = json.loads(service.store.read(digests(made)["manifest.json"]))
        with service.sessions() as session:
            value = session.scalars(select(EditValue).where(EditValue.edit_id == edit)).one()
        assert manifest["base_model"]["digest"] == service.model.digest
        assert manifest["statistics"]["digest"] == made["statistics"]
        assert manifest["settings"] == {
            "alpha": 0.5,
            "contexts": "own",
            "layers": [0, 1, 2],
            "moment_weight": 1000.0,
            "preserve": ["a red fox"],
            "residual_schedule": "spread",
        }
        assert [(e["source"], e["value"]) for e in manifest["edits"]] == [("fox", value.sha256)]
        assert manifest["files"][WEIGHTS] == digests(made)[WEIGHTS]

    def test_many_contexts(self, service: Service) -> None:
        """An edit that is written in many prompts is another version, which says so."""
        edit = str(service.edit("fox"))
        own, many = service.apply(edits=[edit]), service.apply(edits=[edit], contexts="many", preserve=["red fox"])
        assert (own["contexts"], many["contexts"]) == ("own", "many")
        assert digests(own)[WEIGHTS] != digests(many)[WEIGHTS]
        assert "contexts many" in service.store.read(digests(many)["README.md"]).decode()
        assert "contexts" not in service.store.read(digests(own)["README.md"]).decode()
        preserved_alone = service.apply(edits=[edit], preserve=["red fox"])
        assert digests(preserved_alone)[WEIGHTS] not in (digests(own)[WEIGHTS], digests(many)[WEIGHTS])

    def test_card_names_every_concept(self, service: Service) -> None:
        service.edit("a | `fox`\n# <b>", destination={"prompt": "owl"})
        elk = service.edit("elk", destination={"erase": True, "neutral": "art"}, reason="LEGAL_7: it | was\nasked")
        service.edit("jay", destination={"balance": {"blue jay": 0.5, "gray jay": 0.5}})
        made = service.apply(edits="ready")
        card = service.store.read(digests(made)["README.md"]).decode()
        assert "| a \\| \\`fox\\` \\# \\<b\\> | owl |" in card
        assert f"| elk | erased to art | LEGAL\\_7: it \\| was asked | {elk} |" in card
        assert "| jay | blue jay (0.5), gray jay (0.5) |" in card
        assert service.model.digest and service.model.digest in card
        assert "NSFW" in card

    def test_failure_is_told_and_publishes_nothing(self, service: Service) -> None:
        """A value whose bytes are not those that were stored."""
        edit = service.edit("fox")
        with service.sessions() as session:
            session.scalars(select(EditValue).where(EditValue.edit_id == edit)).one().sha256 = "0" * 64
            session.commit()
        made = service.apply(edits="ready", alias="staging")
        assert (made["state"], made["files"], made["commit"]) == ("failed", [], None)
        assert str(edit) in made["problem"]["detail"]
        assert service.get("/v1/models/tiny/aliases") == []
        assert service.apply(edits="ready")["version"] == "v2"  # the number is not used again

    def test_full_disk(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        """The disk fills while the weights are written: a readable problem, no row, no alias."""
        service.edit("fox")

        def full(*_: object) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(LocalStore, "put_file", full)
        made = service.apply(edits="ready", alias="staging")
        assert made["state"] == "failed"
        assert "disk" in made["problem"]["detail"] or "space" in made["problem"]["detail"].lower()
        assert service.get("/v1/models/tiny/aliases") == []


class TestPurity:
    def test_same_set_same_bytes(self, service: Service) -> None:
        """Twice the same, and once in another order: the same commit, so the same bytes in every file."""
        ids = [str(service.edit(source)) for source in ("fox", "owl", "elk")]
        first = service.apply(edits=ids)
        second = service.apply(edits=ids[::-1], notes="again", alias="staging")
        assert (first["version"], second["version"]) == ("v1", "v2")
        assert digests(first) == digests(second)
        assert first["commit"] == second["commit"]

    def test_removal_equals_never_had_it(self, service: Service) -> None:
        ids = [str(service.edit(source)) for source in ("fox", "owl", "elk")]
        never = service.apply(edits=[ids[0], ids[2]])
        had = service.apply(edits=ids)
        removed = service.apply(**{"from": "v2", "remove": [ids[1]]})
        assert digests(removed) == digests(never)
        assert digests(had)[WEIGHTS] != digests(never)[WEIGHTS]

    def test_one_by_one_equals_all_at_once(self, service: Service) -> None:
        """Versions that each add an edit to the last end at the bytes of the version that took all together."""
        first, *others = [str(service.edit(source)) for source in ("fox", "owl", "elk", "old oak")]
        growing = service.apply(edits=[first])
        for edit in others:
            growing = service.apply(**{"from": growing["version"], "add": [edit]})
        batch = service.apply(edits=[first, *others])
        assert growing["version"] == "v4"
        assert digests(growing) == digests(batch)

    def test_factors_lie_beside_the_blobs_and_a_damaged_one_changes_nothing(self, service: Service) -> None:
        service.edit("fox")
        first = service.apply(edits="ready")
        factors = sorted((service.store.folder / "factors").rglob("text_encoder.layer_*.safetensors"))
        assert [path.name for path in factors] == [f"text_encoder.layer_{layer}.safetensors" for layer in (0, 1, 2)]
        assert {path.parent.name for path in factors} == {first["statistics"]}
        content = factors[1].read_bytes()
        factors[1].write_bytes(content[:-8] + bytes(8))
        assert digests(service.apply(edits="ready")) == digests(first)
        assert factors[1].read_bytes() == content

    def test_other_settings_other_bytes(self, service: Service) -> None:
        service.edit("fox")
        made = [service.apply(edits="ready", **settings) for settings in ({}, {"alpha": 0.6}, {"layers": [1, 2]})]
        assert len({digests(checkpoint)[WEIGHTS] for checkpoint in made}) == 3
        assert len({checkpoint["commit"] for checkpoint in made}) == 3


class TestSignature:
    def test_covers_every_file_of_the_revision(self, service: Service) -> None:
        """The edited files, those of the base model, the card and the manifest."""
        service.edit("fox", reason="LEGAL-7")
        made = service.apply(edits="ready")
        manifest = json.loads(service.store.read(digests(made)["manifest.json"]))
        with service.sessions() as session:
            base = {file.path: file.sha256 for file in session.get_one(Model, service.model.id).files}
        own = {path: sha256 for path, sha256 in digests(made).items() if path != "manifest.json"}
        assert manifest["files"] == base | own
        assert manifest["base_model"]["files"] == base
        assert manifest["engine"]["libraries"]["torch"] == torch.__version__
        assert (manifest["edits"][0]["reason"], manifest["edits"][0]["settings"]) == ("LEGAL-7", {})
        bundle = json.loads(service.store.read(signature_of(made)))
        assert bundle["verificationMaterial"]["publicKey"]["hint"] == read_key(signing_key_file(service)).id
        resources = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]["resources"]
        assert {file["name"]: file["digest"] for file in resources} == base | digests(made)

    def test_the_key_changes_neither_the_commit_nor_a_file(self, service: Service, tmp_path: Path) -> None:
        service.edit("fox")
        made = [service.apply(edits="ready")]
        newer = tmp_path / "newer.pem"
        create_key(newer)
        for setting in (newer, "none"):
            context = service.runner.context
            context.settings = context.settings.model_copy(update={"signing_key_file": setting})
            made.append(service.apply(edits="ready"))
        assert len({checkpoint["commit"] for checkpoint in made}) == 1
        assert digests(made[0]) == digests(made[1]) == digests(made[2])
        assert signature_of(made[0]) != signature_of(made[1]) and signature_of(made[2]) is None

    def test_a_key_that_is_gone_fails_the_version(self, service: Service) -> None:
        service.edit("fox")
        signing_key_file(service).unlink()
        made = service.apply(edits="ready")
        assert (made["state"], made["problem"]["title"]) == ("failed", "Signing key unusable")
        assert str(service.settings.signing_key_file) not in made["problem"]["detail"]


class TestCard:
    def test_leads_to_its_evaluations(self, service: Service) -> None:
        """From the card by the weights' sha256 to the version, and from there to what was drawn of it."""
        service.edit("fox")
        made = service.apply(edits="ready")
        text = service.store.read(digests(made)["README.md"]).decode()
        (call,) = re.findall(r"GET (/v1/files/[0-9a-f]{64})", text)
        posted = service.client.post(
            "/v1/models/tiny/checkpoints/v1/previews", json={"prompts": ["a fox"]}, headers=service.keys["apply"]
        )
        (origin,) = service.get(call)["origins"]
        (link,) = origin["evaluations"]
        assert (origin["version"], link["kind"], link["url"]) == ("v1", "preview", posted.headers["Location"])
        assert service.get(link["url"])["id"] == link["id"]
        assert service.get("/v1/models/tiny/checkpoints/v1")["evaluations"] == [link]

    def test_the_hub_reads_its_header(self, service: Service) -> None:

        service.edit("fox")
        made = service.apply(edits="ready")
        data = card_data(service, made)
        assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
        assert set(data.tags) == {"text-to-image", "concept-editing", "emender"}
        assert data.license is None
        assert "license" not in json.loads(service.store.read(digests(made)["manifest.json"]))["base_model"]

    def test_the_license_is_the_base_model_s(self, service: Service) -> None:

        license = {"id": "other", "name": "a: b", "link": "https://a.example/license"}
        with service.sessions() as session:
            session.get_one(Model, service.model.id).license = license
            session.commit()
        service.edit("fox")
        made = service.apply(edits="ready")
        data = card_data(service, made)
        assert [data.license, data.license_name, data.license_link] == list(license.values())
        assert json.loads(service.store.read(digests(made)["manifest.json"]))["base_model"]["license"] == license


class TestAliasAtPublication:
    def test_moved_meanwhile(self, service: Service) -> None:
        """While v2 is built for `staging`, someone points it elsewhere: their move stands, and v2 says so."""
        service.edit("fox")
        service.apply(edits="ready")
        url = "/v1/models/tiny/aliases/staging"
        asked = service.client.post(
            "/v1/models/tiny/apply", json={"edits": "ready", "alias": "staging"}, headers=service.keys["apply"]
        )
        put = service.client.put(url, json={"version": "v1"}, headers=service.keys["apply"])
        assert (asked.status_code, put.status_code) == (202, 201)
        assert service.runner.work()
        made = service.get("/v1/models/tiny/checkpoints/v2")
        assert made["state"] == "published"
        assert made["alias"]["moved"] is False
        assert "points at v1" in made["alias"]["detail"]
        assert service.get(url)["version"] == "v1"


class TestServedFiles:
    def test_edited_over_base_and_no_unedited_variant(self) -> None:
        def stored(path: str, digit: str) -> File:
            return File(path, digit * 64, 1)

        base = [
            stored(path, "a")
            for path in (
                "model_index.json",
                "text_encoder/config.json",
                "text_encoder/model.fp16.safetensors",
                "text_encoder/model.safetensors",
                "text_encoder/model.safetensors.index.json",
                "unet/diffusion_pytorch_model.fp16.safetensors",
            )
        ]
        served = merge_files(base, [stored(WEIGHTS, "b"), stored("README.md", "b")])
        assert {path: file.sha256[0] for path, file in served.items()} == {
            "README.md": "b",
            "model_index.json": "a",
            "text_encoder/config.json": "a",
            WEIGHTS: "b",
            "unet/diffusion_pytorch_model.fp16.safetensors": "a",
        }

    def test_commit_changes_with_path_and_content(self) -> None:
        commits = {
            compute_commit(files) for files in ([("a", "1")], [("b", "1")], [("a", "2")], [("a", "1"), ("b", "2")])
        }
        assert len(commits) == 4
        assert compute_commit([("a", "1"), ("b", "2")]) == compute_commit([("b", "2"), ("a", "1")])


def test_lora_gives_the_same_update(service: Service, base_folder: Path) -> None:
    """base + up · down of the adapter is the published weight, to float32 and one rounding."""
    service.edit("fox")
    service.edit("owl")
    made = service.apply(edits="ready")
    base = read_base(base_folder / WEIGHTS)
    published = load(service.store.read(digests(made)[WEIGHTS]))
    lora = load(service.store.read(digests(made)["adapters/lora.safetensors"]))
    for layer in range(3):
        name = f"lora_te_text_model_encoder_layers_{layer}_mlp_fc2"
        key = f"text_model.encoder.layers.{layer}.mlp.fc2.weight"
        delta = lora[f"{name}.lora_up.weight"].double() @ lora[f"{name}.lora_down.weight"].double()
        torch.testing.assert_close(base[key].double() + delta, published[key].double(), rtol=1e-5, atol=1e-6)
