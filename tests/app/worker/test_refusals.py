"""Pipelines that cannot be edited, over HTTP: the model's state says why, and nothing of it is stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.app.worker.conftest import Service
from tests.generators import write_whole_pipeline


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_last_part(folder: Path) -> None:
    sorted((folder / "text_encoder").glob("*-of-*.safetensors"))[-1].unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an unknown pipeline class": (
        lambda folder: rewrite(folder / "model_index.json", _class_name="KolorsPipeline"),
        "a KolorsPipeline cannot be edited: only AuraFlowPipeline, ChromaPipeline, ",
    ),
    "an encoder of an unknown structure": (
        lambda folder: rewrite(folder / "text_encoder" / "config.json", model_type="mamba"),
        "text_encoder/ is a mamba, which cannot be edited: only gemma2, ",
    ),
    "an encoder without one of its files": (remove_last_part, "which model.safetensors.index.json names"),
    "a tokenizer without a chat template": (
        lambda folder: (folder / "tokenizer" / "chat_template.jinja").unlink(),
        "no chat template, which this family needs: add chat_template.jinja",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_pipeline(tmp_path_factory.mktemp("refused") / "z_image", "z_image", shard_size="30kB")


@pytest.mark.parametrize("what", REFUSED)
def test_registration_says_why_a_pipeline_is_refused(service: Service, roots: Path, written: Path, what: str) -> None:
    change, expected = REFUSED[what]
    folder = shutil.copytree(written, roots / "refused")
    change(folder)
    try:
        service.post("/v1/models", {"name": "refused", "source": "refused"}, status=202)
        service.work()
    finally:
        shutil.rmtree(folder)
    model = service.get("/v1/models/refused")
    assert (model["state"], model["problem"]["title"]) == ("failed", "Unsupported pipeline")
    assert expected in model["problem"]["detail"]
    edit = {"source": "cat", "destination": {"prompt": "dog"}}
    assert service.post("/v1/models/refused/edits", edit, status=409)["title"] == "Model not ready"
