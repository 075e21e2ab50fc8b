import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import editing
from app.db.engine import Sessions
from app.db.models import AuditEvent, Job, JsonObject, Model, Statistics
from app.jobs.enqueue import enqueue
from app.jobs.kinds import REGISTER_MODEL
from app.settings import Settings
from app.storage.local import LocalStore
from app.worker.runner import Runner
from editing.families.registry import FAMILIES
from emender.schemas.common import Progress
from tests.app.worker.conftest import QUICK, Service
from tests.broken_models import BROKEN, UNUSUAL
from tests.generators import write_whole_pipeline
from tests.pipelines import LAYERS, MLP_WIDTH, WIDTH

Register = Callable[..., Model]


@pytest.fixture
def settings(settings: Settings, tmp_path: Path, roots: Path) -> Settings:
    """A second root, for pipelines that something is wrong with."""
    (tmp_path / "more").mkdir()
    return settings.model_copy(update={"model_roots": (roots, tmp_path / "more")})


@pytest.fixture
def copy(tmp_path: Path, roots: Path) -> Path:
    """A copy of the tiny pipeline, to be changed."""
    return Path(shutil.copytree(roots / "tiny", tmp_path / "more" / "changed"))


@pytest.fixture
def register(runner: Runner, add_model: Callable[..., Model], factory: Sessions) -> Register:
    """Register a source; the model as it is after its job."""

    def run(source: str, **columns: Any) -> Model:
        model = add_model(source=source, **columns)
        with factory() as session:
            enqueue(session, kind=REGISTER_MODEL, target_id=model.id, actor="test")
            session.commit()
        assert runner.work()
        with factory() as session:
            found = session.get_one(Model, model.id)
            assert found.files is not None  # loaded while the session is open
            return found

    return run


def problem(model: Model) -> JsonObject:
    assert model.state == "failed" and model.digest is None and model.files == []
    assert model.problem is not None
    return model.problem


def test_every_file_is_stored(register: Register, store: LocalStore, roots: Path, factory: Sessions) -> None:
    model = register("tiny")
    description = editing.describe_pipeline(roots / "tiny")
    assert (model.state, model.family, model.digest, model.problem) == ("ready", "sd1", description.digest, None)
    assert model.encoders == [{"name": "text_encoder", "layers": LAYERS, "width": WIDTH, "mlp_width": MLP_WIDTH}]
    on_disk = {path.relative_to(roots / "tiny").as_posix() for path in (roots / "tiny").rglob("*") if path.is_file()}
    assert {file.path for file in model.files} == on_disk
    for file in model.files:
        content = (roots / "tiny" / file.path).read_bytes()
        assert store.read(file.sha256) == content and file.size == len(content)
    with factory() as session:
        (event,) = session.query(AuditEvent).all()
    assert event.action == "model.ready" and event.details["digest"] == model.digest


def test_the_stored_pipeline_can_be_edited(register: Register, runner: Runner, roots: Path) -> None:
    model = register("tiny")
    ours = runner.context.pipelines.get(model.id).encoder.output_matrix(0).weight
    theirs = editing.load_pipeline(roots / "tiny").encoder.output_matrix(0).weight
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# Tiny", {"id": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://a.example\n---\n",
            {"id": "other", "name": "own", "link": "https://a.example"},
        ),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- no mapping\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("# Under the MIT license", None),
    ],
)
def test_the_license_is_read_from_the_model_card(
    register: Register, copy: Path, card: str, expected: JsonObject | None
) -> None:
    (copy / "README.md").write_text(card)
    model = register("changed")
    assert (model.state, model.license) == ("ready", expected)


def test_a_requested_license_is_kept(register: Register, copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    assert register("changed", license={"id": "openrail"}).license == {"id": "openrail"}


def test_a_missing_folder_fails_the_registration(register: Register) -> None:
    found = problem(register("nowhere"))
    assert found["title"] == "Source unavailable" and found["errors"][0]["pointer"] == "/source"
    assert "EMENDER_MODEL_ROOTS" in found["detail"]


@pytest.mark.parametrize("source", ["..", ".", "tiny\\..", "more"])
def test_the_source_is_never_used_as_a_path(register: Register, source: str) -> None:
    assert problem(register(source))["title"] == "Source unavailable"


def test_a_pipeline_of_pickles_is_rejected(register: Register, copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    found = problem(register("changed"))
    assert (
        found["title"] == "Unsafe pipeline" and "unet/" in found["detail"] and "safe_serialization" in found["detail"]
    )


def test_an_unknown_family_is_rejected(register: Register, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "KolorsPipeline"}))
    found = problem(register("changed"))
    assert found["title"] == "Unsupported pipeline" and "KolorsPipeline" in found["detail"]
    assert all(family.pipeline_class in found["detail"] for family in FAMILIES.values())


@pytest.fixture
def z_image(tmp_path: Path) -> Path:
    """A pipeline with an LLM, whose weights are in several files, to be changed."""
    return write_whole_pipeline(tmp_path / "more" / "z_image", "z_image", shard_size="30kB")


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_encoder_of_no_known_class_is_rejected(register: Register, z_image: Path) -> None:
    rewrite(z_image / "model_index.json", text_encoder=["chatglm", "ChatGLMModel"])
    detail = problem(register("z_image"))["detail"]
    assert "names no model of transformers for text_encoder: 'ChatGLMModel'" in detail


@pytest.mark.parametrize(
    ("name", "model_class"), [("gpt2", "GPT2Model"), ("clip_text_model", "CLIPTextModel"), ("t5", "T5EncoderModel")]
)
def test_an_encoder_of_another_structure_is_rejected(
    register: Register, z_image: Path, name: str, model_class: str
) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    (z_image / "text_encoder" / "config.json").write_text(json.dumps({"model_type": name, **sizes}))
    rewrite(z_image / "model_index.json", text_encoder=["transformers", model_class])
    assert f"text_encoder/ is a {name}, which cannot be edited: only" in problem(register("z_image"))["detail"]


def test_a_class_that_is_no_such_encoder_is_rejected(register: Register, copy: Path) -> None:
    rewrite(copy / "model_index.json", text_encoder=["transformers", "BertModel"])
    assert "a BertModel is no CLIP text encoder" in problem(register("changed"))["detail"]


def test_an_encoder_without_sizes_is_rejected(register: Register, z_image: Path) -> None:
    (z_image / "text_encoder" / "config.json").write_text('{"model_type": "qwen3"}')
    assert "text_encoder/config.json does not describe" in problem(register("z_image"))["detail"]


def test_a_missing_part_of_an_encoder_is_rejected(register: Register, z_image: Path) -> None:
    part = sorted((z_image / "text_encoder").glob("*-of-*.safetensors"))[-1]
    part.unlink()
    detail = problem(register("z_image"))["detail"]
    assert f"text_encoder/ has no {part.name}, which model.safetensors.index.json names" in detail


def test_a_missing_chat_template_is_rejected(register: Register, z_image: Path) -> None:
    (z_image / "tokenizer" / "chat_template.jinja").unlink()
    detail = problem(register("z_image"))["detail"]
    assert "no chat template, which this family needs: add chat_template.jinja" in detail


def test_a_missing_tokenizer_is_rejected(register: Register, z_image: Path) -> None:
    (z_image / "tokenizer" / "tokenizer.json").unlink()
    assert "has no tokenizer.json, vocab.json or spiece.model" in problem(register("z_image"))["detail"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("vae/config.json", "a Other cannot be used: only AutoencoderKL, "),
        ("scheduler/scheduler_config.json", "a Other cannot be used for flow matching: only FlowMatchEuler"),
    ],
)
def test_other_autoencoders_and_schedulers_are_rejected(
    register: Register, z_image: Path, path: str, expected: str
) -> None:
    rewrite(z_image / path, _class_name="Other")
    assert expected in problem(register("z_image"))["detail"]


@pytest.mark.parametrize("kind", ["git-lfs pointer", "EDM", "pickled safety checker", "NaN", "fifo as a model card"])
def test_a_broken_model_says_what_is_wrong_and_is_registered_again(service: Service, copy: Path, kind: str) -> None:
    make, sentence = BROKEN[kind]
    whole = Path(shutil.copytree(copy, copy.parent / "whole"))
    make(copy)
    service.post("/v1/models", {"name": "mine", "source": "changed"}, status=202)
    service.work()
    failed = service.get("/v1/models/mine")
    assert failed["state"] == "failed" and re.search(sentence, failed["problem"]["detail"])
    shutil.rmtree(copy)
    whole.rename(copy)
    service.post("/v1/models", {"name": "mine", "source": "changed"}, status=202)
    service.work()
    again = service.get("/v1/models/mine")
    assert (again["state"], again["problem"]) == ("ready", None)


@pytest.mark.parametrize("kind", ["half precision only", "byte-order marks", "no length of the tokenizer"])
def test_an_unusual_model_can_be_edited(service: Service, copy: Path, kind: str) -> None:
    UNUSUAL[kind](copy)
    service.post("/v1/models", {"name": "mine", "source": "changed"}, status=202)
    service.work()
    edit = {"source": "cat", "destination": {"prompt": "dog"}, "settings": QUICK}
    posted = service.post("/v1/models/mine/edits", edit, status=202)
    service.work()
    assert service.get(f"/v1/edits/{posted['id']}")["state"] == "ready"


def test_a_folder_without_a_pipeline_is_rejected(register: Register, tmp_path: Path) -> None:
    (tmp_path / "more" / "empty").mkdir()
    assert "model_index.json" in problem(register("empty"))["detail"]


class TestShippedMoments:
    def ship(self, folder: Path, *, width: int = MLP_WIDTH, layers: int = LAYERS - 1) -> editing.SecondMoments:
        moment = torch.eye(width, dtype=torch.float64)
        moments = editing.SecondMoments(dict.fromkeys(range(layers), moment), captions=7, tokens=40)
        moments.save(folder / "second_moments.safetensors")
        return moments

    def statistics(self, factory: Sessions) -> list[Statistics]:
        with factory() as session:
            return session.query(Statistics).all()

    def test_shipped_moments_become_ready_statistics(
        self, register: Register, copy: Path, factory: Sessions, store: LocalStore
    ) -> None:
        moments = self.ship(copy)
        model = register("changed")
        (row,) = self.statistics(factory)
        assert (row.model_id, row.state, row.captions_name) == (model.id, "ready", "shipped")
        assert (row.captions, row.tokens, row.digest) == (7, 40, moments.digest)
        assert row.digest is not None
        assert editing.SecondMoments.load(store.fetch(row.digest)).digest == moments.digest
        assert "second_moments.safetensors" not in {file.path for file in model.files}

    @pytest.mark.parametrize("wrong", [{"width": 8}, {"layers": LAYERS + 1}])
    def test_moments_of_another_encoder_are_rejected(
        self, register: Register, copy: Path, factory: Sessions, wrong: dict[str, int]
    ) -> None:
        self.ship(copy, **wrong)
        assert "of another text encoder" in problem(register("changed"))["detail"]
        assert self.statistics(factory) == []

    def test_truncated_moments_are_rejected(self, register: Register, copy: Path) -> None:
        self.ship(copy)
        file = copy / "second_moments.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert "has no second moments that can be read" in problem(register("changed"))["detail"]


def test_a_second_attempt_reuses_the_stored_files(
    register: Register, runner: Runner, factory: Sessions, monkeypatch: pytest.MonkeyPatch, stopping: threading.Event
) -> None:
    """Stopped between two files, the job goes back; the next run takes it to the end."""
    put, stored = LocalStore.put_file, []

    def stop_after_three(self: LocalStore, path: Path) -> str:
        stored.append(path)
        if len(stored) == 3:
            stopping.set()
        return put(self, path)

    monkeypatch.setattr(LocalStore, "put_file", stop_after_three)
    model = register("tiny")
    assert model.state == "registering" and len(stored) == 3
    stopping.clear()
    assert runner.work()
    with factory() as session:
        assert session.get_one(Model, model.id).state == "ready"
        assert session.query(Job).one().attempt == 1


def test_the_job_reports_its_stage(register: Register, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    monkeypatch.setattr(runner.heartbeat, "report", lambda _, progress: seen.append(progress))
    register("tiny")
    assert [(step.stage, step.done, step.total) for step in seen] == [("storing", done, 11) for done in range(11)]


def test_a_registered_classifier_is_opened(register: Register, runner: Runner) -> None:
    model = register("tiny", classifier="emoji")
    assert model.state == "ready"
    judge = runner.context.pipelines.classifier(model.id)
    assert judge is not None and "dog" in judge.names
    assert runner.context.pipelines.classifier(model.id) is judge  # kept warm


def test_a_model_without_a_classifier_has_none(register: Register, runner: Runner) -> None:
    assert runner.context.pipelines.classifier(register("tiny").id) is None


def test_a_missing_classifier_fails_the_registration(register: Register) -> None:
    found = problem(register("tiny", classifier="absent"))
    assert "no classifier 'absent'" in found["detail"] and "emoji" in found["detail"]
    assert found["errors"][0]["pointer"] == "/classifier"


def test_a_folder_without_a_classifier_fails_the_registration(register: Register) -> None:
    assert "no image classifier" in problem(register("tiny", classifier="tiny"))["detail"]
