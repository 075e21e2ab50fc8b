"""Loading a pipeline of each family: its shapes, and that it does to prompts and latents what diffusers does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Generator, Tensor

from editing.condition import Condition
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.pipelines import EditablePipeline, load_pipeline
from editing.stage_one.optimize import optimize_values
from editing.values import EditValue
from tests.editing.values import first
from tests.pipelines import LENGTH, PROJECTION, WIDTH, WIDTH_2

PROMPTS = ["a cat", "The old tree, in the sea!", "", "word " * 30]
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def diffusers(any_folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(any_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_condition(diffusers: Any, prompts: list[str]) -> Condition:
    """What diffusers' own pipeline makes of prompts."""
    with torch.no_grad():
        encoded = diffusers.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return Condition(encoded[0], pooled=encoded[2] if isinstance(diffusers, StableDiffusionXLPipeline) else None)


class TestLoadPipeline:
    def test_modules_take_no_gradients(self, any_pipeline: EditablePipeline) -> None:
        encoders = (encoder.model for encoder in any_pipeline.encoders)
        for model in (*encoders, any_pipeline.generator.network, any_pipeline.generator.autoencoder.model):
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_latent_and_image_sizes(self, pipeline: EditablePipeline) -> None:
        assert pipeline.generator.latent_shape == (4, 8, 8)
        assert pipeline.generator.image_size == (16, 16)
        assert pipeline.tokenizer.max_length == LENGTH

    def test_each_family_is_loaded(
        self, pipeline: EditablePipeline, sd2: EditablePipeline, sdxl: EditablePipeline
    ) -> None:
        assert [len(p.encoders) for p in (pipeline, sd2, sdxl)] == [1, 1, 2]
        predicted = [p.generator.scheduler.config.prediction_type for p in (pipeline, sd2, sdxl)]
        assert predicted == ["epsilon", "v_prediction", "epsilon"]
        assert [encoder.tokenizer.pad_id for encoder in (*sd2.encoders, *sdxl.encoders)] == [
            0,
            sdxl.tokenizer.eos_id,
            0,
        ]
        assert [encoder.default_edited_layers for encoder in sdxl.encoders] == [(1, 2, 3), (1, 2, 3, 4, 5)]

    def test_pickles_are_refused(self, folder: Path, tmp_path: Path) -> None:
        copied = shutil.copytree(folder, tmp_path / "pickled")
        (weights,) = (copied / "unet").glob("*.safetensors")
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(UnsafePipeline, match="unet/"):
            load_pipeline(copied)

    def test_other_prediction_types_are_refused(self, folder: Path, tmp_path: Path) -> None:
        path = shutil.copytree(folder, tmp_path / "other") / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
        with pytest.raises(UnsupportedPipeline, match="predicts sample"):
            load_pipeline(tmp_path / "other")

    def test_u_net_of_another_family_is_refused(self, folder: Path, sdxl: EditablePipeline, tmp_path: Path) -> None:
        assert sdxl.folder
        mixed = shutil.copytree(sdxl.folder, tmp_path / "mixed")
        shutil.rmtree(mixed / "unet")
        shutil.copytree(folder / "unet", mixed / "unet")
        with pytest.raises(UnsupportedPipeline, match="unet/ is not"):
            load_pipeline(mixed)


class TestEncode:
    def test_equals_diffusers(self, any_pipeline: EditablePipeline, diffusers: Any) -> None:
        ours, theirs = any_pipeline.encode(PROMPTS), diffusers_condition(diffusers, PROMPTS)
        torch.testing.assert_close(ours.states, theirs.states, **EXACT)
        torch.testing.assert_close(ours.pooled, theirs.pooled, **EXACT)

    def test_sdxl_condition_has_both_encoders(self, sdxl: EditablePipeline) -> None:
        condition = sdxl.encode(PROMPTS)
        assert condition.states.shape == (len(PROMPTS), LENGTH, WIDTH + WIDTH_2)
        assert condition.pooled is not None
        assert condition.pooled.shape == (len(PROMPTS), PROJECTION)


class TestPredict:
    def test_equals_diffusers(
        self, any_pipeline: EditablePipeline, diffusers: Any, record_difference: Callable[[str, float], None]
    ) -> None:
        """Every call of the U-Net that diffusers' own pipeline makes for a prompt, made by us."""
        calls: list[tuple[Tensor, Tensor, Tensor]] = []

        def record(_: object, inputs: tuple[Tensor, Tensor], __: object, output: tuple[Tensor]) -> None:
            calls.append((*inputs, output[0]))

        hook = diffusers.unet.register_forward_hook(record, with_kwargs=True)
        diffusers(PROMPTS[1], num_inference_steps=3, guidance_scale=1.0, output_type="latent", generator=_seeded())
        hook.remove()
        assert len(calls) == 3
        for noisy, timestep, expected in calls:
            with torch.no_grad():
                prediction = any_pipeline.generator.predict(
                    noisy, timestep.expand(1), any_pipeline.encode(PROMPTS[1:2])
                )
            torch.testing.assert_close(prediction, expected, **EXACT)
            record_difference(any_pipeline.family, float((prediction - expected).abs().max()))


class TestSample:
    @pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
    def test_equals_diffusers(self, any_pipeline: EditablePipeline, diffusers: Any, guidance_scale: float) -> None:
        """With the same solver and the same noise: its scaling, and what guidance leads away from."""
        diffusers.scheduler = DPMSolverMultistepScheduler.from_config(diffusers.scheduler.config)
        expected = diffusers(
            PROMPTS[0],
            num_inference_steps=4,
            guidance_scale=guidance_scale,
            latents=torch.randn(1, 4, 8, 8, generator=_seeded()),
            output_type="latent",
        ).images
        drawn = any_pipeline.sample(
            PROMPTS[:1], generators=[_seeded()], num_inference_steps=4, guidance_scale=guidance_scale
        )
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)

    def test_guidance_can_use_the_encoded_empty_prompt(self, sdxl: EditablePipeline, tmp_path: Path) -> None:
        assert sdxl.folder
        path = shutil.copytree(sdxl.folder, tmp_path / "other") / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "force_zeros_for_empty_prompt": False}))
        drawn, other = (
            p.sample(PROMPTS[:1], generators=[_seeded()], num_inference_steps=2, guidance_scale=5.0)
            for p in (sdxl, load_pipeline(tmp_path / "other"))
        )
        assert not torch.allclose(drawn, other)


def _seeded() -> Generator:
    return Generator().manual_seed(0)


class TestPrecision:
    def test_bfloat16_agrees_with_float32(self, folder: Path, pipeline: EditablePipeline) -> None:
        assert pipeline.generator.network.dtype == torch.float32  # the CPU gains nothing by less
        mixed = load_pipeline(folder, generator_dtype=torch.bfloat16)
        inputs = latents(pipeline)
        exact, rounded = (p.generator.predict_in_chunks(*inputs) for p in (pipeline, mixed))
        assert rounded.dtype == torch.float32
        assert 0 < float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())

    def test_settings_of_sampling_default_to_those_of_the_family(self, pipeline: EditablePipeline) -> None:
        options: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 7.5}
        default, expected = (pipeline.sample(["a cat"], generators=[_seeded()], **given) for given in ({}, options))
        assert torch.equal(default, expected)

    def test_u_net_is_compiled_on_request(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled = []
        monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: compiled.append(unet))
        load_pipeline(folder)
        assert compiled == []
        pipeline = load_pipeline(folder, compile_generator=True)
        assert compiled == [pipeline.generator.network]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_gpu_agrees_with_the_cpu(self, folder: Path, pipeline: EditablePipeline) -> None:
        gpu = load_pipeline(folder, device="cuda")
        assert gpu.generator.network.dtype == torch.bfloat16
        assert gpu.encoder.dtype == torch.float32
        inputs = latents(pipeline)
        exact, rounded = (
            pipeline.generator.predict_in_chunks(*inputs),
            gpu.generator.predict_in_chunks(inputs[0].cuda(), inputs[1].cuda(), inputs[2].map(Tensor.cuda)).cpu(),
        )
        assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())

        settings = StageOneSettings(
            optimization_steps=6,
            warmup_steps=3,
            num_images=2,
            noise_pool_size=6,
            noise_batch_size=2,
            num_inference_steps=2,
        )
        edit = ConceptEdit("cat", DestinationPrompt("dog"), settings=settings)
        (ours,), (theirs,) = optimize_values(pipeline, [edit]), optimize_values(gpu, [edit])
        assert isinstance(ours, EditValue) and isinstance(theirs, EditValue)
        assert theirs.text_losses[0] == pytest.approx(ours.text_losses[0], rel=1e-3)
        assert theirs.noise_losses[0] == pytest.approx(ours.noise_losses[0], rel=0.1)
        again = optimize_values(gpu, [edit])[0]
        assert isinstance(again, EditValue)
        torch.testing.assert_close(first(again).delta, first(theirs).delta)


def latents(pipeline: EditablePipeline) -> tuple[Tensor, Tensor, Condition]:
    noisy = torch.randn(5, *pipeline.generator.latent_shape, generator=_seeded())
    return noisy, torch.arange(0, 1000, 200), pipeline.encode(["cat", "dog", "a", "b", "c"])
