"""Loading a pipeline: its shapes, and the folders that are refused."""

import json
import shutil
from pathlib import Path

import pytest

from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.pipelines import EditablePipeline, load_pipeline
from tests.pipelines import LENGTH


class TestLoadPipeline:
    def test_takes_no_gradient(self, pipeline: EditablePipeline) -> None:
        for model in (pipeline.encoder.model, pipeline.unet, pipeline.vae):
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_knows_its_shapes(self, pipeline: EditablePipeline) -> None:
        assert pipeline.latent_shape == (4, 8, 8)
        assert pipeline.image_size == (16, 16)
        assert pipeline.tokenizer.max_length == LENGTH

    def test_refuses_pickles(self, folder: Path, tmp_path: Path) -> None:
        copied = shutil.copytree(folder, tmp_path / "pickled")
        (weights,) = (copied / "unet").glob("*.safetensors")
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(UnsafePipeline, match="unet/"):
            load_pipeline(copied)

    @pytest.mark.parametrize(
        ("path", "change", "message"),
        [
            ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "sdxl"),
            ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
        ],
    )
    def test_refuses_other_families(
        self, folder: Path, tmp_path: Path, path: str, change: dict[str, str], message: str
    ) -> None:
        copied = shutil.copytree(folder, tmp_path / "other")
        content = json.loads((copied / path).read_text())
        (copied / path).write_text(json.dumps({**content, **change}))
        with pytest.raises(UnsupportedPipeline, match=message):
            load_pipeline(copied)
