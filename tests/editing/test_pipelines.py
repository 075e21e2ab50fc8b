"""Loading a pipeline: its shapes, and the folders that are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from editing.concepts import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.pipelines import EditablePipeline, load_pipeline
from editing.values import Value, optimize_values
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


class TestPrecision:
    def test_bfloat16_agrees_with_float32(self, folder: Path, pipeline: EditablePipeline) -> None:
        assert not pipeline.mixed_precision  # the CPU gains nothing by it
        mixed = load_pipeline(folder, mixed_precision=True)
        inputs = latents(pipeline)
        exact, rounded = pipeline.predict_all(*inputs), mixed.predict_all(*inputs)
        assert rounded.dtype == torch.float32
        assert 0 < float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())

    def test_compiles_the_u_net_where_asked(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled = []
        monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: compiled.append(unet))
        load_pipeline(folder)
        assert compiled == []
        pipeline = load_pipeline(folder, compile_unet=True)
        assert compiled == [pipeline.unet]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_the_gpu_agrees_with_the_cpu(self, folder: Path, pipeline: EditablePipeline) -> None:
        gpu = load_pipeline(folder, device="cuda")
        assert gpu.mixed_precision
        assert 1 <= gpu.unet_parts.size <= 256
        inputs = latents(pipeline)
        exact, rounded = pipeline.predict_all(*inputs), gpu.predict_all(*(each.cuda() for each in inputs)).cpu()
        assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())

        settings = StageOneSettings(steps=6, warm_start=3, images=2, bank=6, noise_batch=2, solver_steps=2)
        edit = ConceptEdit("cat", DestinationPrompt("dog"), settings=settings)
        (ours,), (theirs,) = optimize_values(pipeline, [edit]), optimize_values(gpu, [edit])
        assert isinstance(ours, Value) and isinstance(theirs, Value)
        assert theirs.text_losses[0] == pytest.approx(ours.text_losses[0], rel=1e-3)
        assert theirs.noise_losses[0] == pytest.approx(ours.noise_losses[0], rel=0.1)
        again = optimize_values(gpu, [edit])[0]
        assert isinstance(again, Value)
        torch.testing.assert_close(again.delta, theirs.delta)


def latents(pipeline: EditablePipeline) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(5, *pipeline.latent_shape, generator=generator)
    states = pipeline.encoder.encode([pipeline.tokenizer.encode(word).ids for word in ("cat", "dog", "a", "b", "c")])
    return noisy, torch.arange(0, 1000, 200), states
