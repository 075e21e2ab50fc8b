"""Both stages on a GPU, for every family: they give what they give on the CPU."""

from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from editing.edits import ConceptEdit, Destination, DestinationPrompt, ReferenceImages, StageOneSettings
from editing.pipelines import EditablePipeline, load_pipeline
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import compute_update
from editing.uce.projections import compute_projection_update
from editing.values import EditValue
from tests.editing.conftest import CAPTIONS
from tests.families import TEXTS
from tests.generators import write_whole_pipeline
from tests.pipelines import write_pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
TEXT = StageOneSettings(objective="text", text_optimizer="adam", optimization_steps=4)
HYBRID = StageOneSettings(
    optimization_steps=6,
    warmup_steps=3,
    num_images=2,
    noise_pool_size=6,
    noise_batch_size=2,
    num_inference_steps=2,
    guidance_scale=3.0,
)
PAIRS = [("cat", "dog"), ("old tree", "the sea"), ("small boat", "red hat")]
EDITS = [ConceptEdit(source, DestinationPrompt(target), settings=TEXT) for source, target in PAIRS]
KINDS: dict[str, Destination] = {
    "prompt": DestinationPrompt("red hat"),
    "images": ReferenceImages((Image.new("RGB", (40, 20), "red"),)),
}
FAMILIES = ["sd1", "sd2", "sdxl", *(name for name in TEXTS if name != "sana")]  # Sana takes minutes on the CPU


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("gpu") / request.param
    if request.param in TEXTS:
        return write_whole_pipeline(folder, request.param)
    return write_pipeline(folder, family=request.param)


@pytest.fixture(scope="module")
def cpu(folder: Path) -> EditablePipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def gpu(folder: Path) -> EditablePipeline:
    return load_pipeline(folder, device=DEVICE)


@pytest.fixture(scope="module")
def moments(cpu: EditablePipeline) -> SecondMoments:
    return SecondMoments.join([estimate_second_moments(encoder, CAPTIONS) for encoder in cpu.encoders])


def compute_error(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference, Frobenius."""
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


def test_only_the_generator_is_bfloat16(gpu: EditablePipeline) -> None:
    assert {parameter.dtype for parameter in gpu.generator.network.parameters()} == {torch.bfloat16}
    assert {encoder.dtype for encoder in gpu.encoders} == {torch.float32}
    assert gpu.generator.autoencoder.model.dtype == torch.float32


@torch.no_grad()
def test_conditions_are_those_of_the_cpu(cpu: EditablePipeline, gpu: EditablePipeline) -> None:
    prompts = ["a cat", "the old tree in the sea", ""]
    for found, expected in zip(gpu.encode(prompts).tensors, cpu.encode(prompts).tensors, strict=True):
        assert compute_error(found, expected) < 1e-4


def test_second_moments_are_those_of_the_cpu(gpu: EditablePipeline, moments: SecondMoments) -> None:
    for encoder in gpu.encoders:
        found, expected = estimate_second_moments(encoder, CAPTIONS), moments.select(encoder.name)
        assert found.tokens == expected.tokens
        for layer, moment in expected.moments.items():
            assert compute_error(found.moments[layer], moment) < 1e-4


def test_updates_are_those_of_the_cpu(
    cpu: EditablePipeline, gpu: EditablePipeline, moments: SecondMoments, tmp_path: Path
) -> None:
    file = tmp_path / "second_moments.safetensors"
    file.write_bytes(moments.to_bytes())
    values, others = (cast(list[EditValue], optimize_values(pipeline, EDITS)) for pipeline in (cpu, gpu))
    for number, encoder in enumerate(gpu.encoders):
        for value, other in zip(values, others, strict=True):
            assert compute_error(other.encoders[encoder.name].hidden, value.encoders[encoder.name].hidden) < 1e-4
            assert compute_error(other.encoders[encoder.name].delta, value.encoders[encoder.name].delta) < 0.02
        found, expected = (
            compute_update(each, EDITS, values, FactoredMoments(file, encoder=each.name), moment_weight=1.0)
            for each in (encoder, cpu.encoders[number])
        )
        for layer in expected.layers:
            assert compute_error(found.to_dense(layer), expected.to_dense(layer)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_losses_are_those_of_the_cpu(
    folder: Path, cpu: EditablePipeline, gpu: EditablePipeline, kind: str
) -> None:
    edit = ConceptEdit("cat", KINDS[kind], templates=("a {} on it", "{}"), settings=HYBRID)
    exact = load_pipeline(folder, device=DEVICE, generator_dtype=torch.float32)
    first, second, rounded = (optimize_values(pipeline, [edit])[0] for pipeline in (cpu, exact, gpu))
    assert isinstance(first, EditValue) and isinstance(second, EditValue) and isinstance(rounded, EditValue)
    assert second.noise_losses[0] == pytest.approx(first.noise_losses[0], rel=0.05)
    assert all(bool(part.delta.isfinite().all() and part.delta.any()) for part in rounded.encoders.values())


def test_pictures_are_drawn(gpu: EditablePipeline) -> None:
    latents = gpu.sample(
        ["a cat", "a dog"],
        generators=[torch.Generator().manual_seed(seed) for seed in range(2)],
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    pictures = gpu.generator.decode(latents)
    assert pictures.device.type == torch.device(DEVICE).type
    assert pictures.shape == (2, 3, *gpu.generator.image_size) and bool(pictures.isfinite().all())


def test_text_projections_are_those_of_the_cpu(cpu: EditablePipeline, gpu: EditablePipeline) -> None:
    found, expected = (compute_projection_update(pipeline, EDITS) for pipeline in (gpu, cpu))
    assert compute_error(found.change, expected.change) < 0.05  # a norm before it is bfloat16
