"""The noise objectives of stage I through the transformers of every family."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from editing.chunks import ChunkSize
from editing.edits import ConceptEdit, DestinationPrompt, ReferenceImages, StageOneSettings
from editing.families.conditions import join_encodings
from editing.pipelines import EditablePipeline, load_pipeline
from editing.stage_one.noise import NoiseBatch, NoisedPrompts
from editing.stage_one.optimization import build_optimizations, draw_noise
from editing.stage_one.optimize import compute_noise_losses, optimize_values
from editing.stage_one.prompt_batch import PromptBatch
from editing.values import EditValue
from tests.families import TEXTS
from tests.generators import write_whole_pipeline

FAMILIES = sorted(set(TEXTS) - {"pixart_alpha", "z_image-llama", "sana"})  # these are as others, or slow
SETTINGS = StageOneSettings(
    objective="noise",
    optimization_steps=3,
    num_images=2,
    noise_pool_size=6,
    noise_batch_size=4,
    num_inference_steps=2,
    guidance_scale=3.0,
)
EDITS = [
    ConceptEdit("cat", DestinationPrompt("dog"), settings=SETTINGS),
    ConceptEdit("old tree", ReferenceImages((Image.new("RGB", (40, 20), "red"),)), settings=SETTINGS),
]


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EditablePipeline:
    return load_pipeline(write_whole_pipeline(tmp_path_factory.mktemp("whole") / request.param, request.param))


class _Repeat:
    def __init__(self, batch: NoiseBatch) -> None:
        self.batch = batch

    def draw_batch(self) -> NoiseBatch:
        return self.batch


def test_every_edit_gets_a_value(pipeline: EditablePipeline) -> None:
    for value in optimize_values(pipeline, EDITS):
        assert isinstance(value, EditValue), value
        assert len(value.noise_losses) == SETTINGS.optimization_steps
        assert all(0 < encoded.delta_norm < float("inf") for encoded in value.encoders.values())


def test_chunked_gradient_equals_that_of_the_whole_loss(
    pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of the transformer and one graph give the same gradient of L_noise with respect to δ."""
    generator = pipeline.generator
    monkeypatch.setattr(generator, "chunks", ChunkSize(3))
    running = [each for i, edit in enumerate(EDITS) for each in build_optimizations(edit, pipeline, index=i)]
    batches = []
    draw_noise(pipeline, running)
    for each in running:
        assert each.noise
        batches.append(each.noise.draw_batch())
        each.noise = _Repeat(batches[-1])
    prompts = PromptBatch(pipeline, running)
    width = sum(encoder.width for encoder in pipeline.encoders)
    deltas = torch.randn(len(running), width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    condition = join_encodings(pipeline.family, prompts.encode(deltas))
    drawn = NoisedPrompts.draw([each.noise for each in running if each.noise], prompts.first)
    losses, gradient = compute_noise_losses(generator, drawn, condition)
    (chunked,) = torch.autograd.grad(condition.dot(gradient), deltas, retain_graph=True)

    whole: list[Tensor] = []
    for start, batch in zip(prompts.first.tolist(), batches, strict=True):
        predicted = generator.predict(batch.noisy, batch.timesteps, condition[start + batch.templates])
        whole.append((predicted - batch.target).square().mean())
    torch.testing.assert_close(losses, torch.stack(whole).detach(), rtol=1e-4, atol=1e-6)
    (expected,) = torch.autograd.grad(torch.stack(whole).sum(), deltas)
    assert float(expected.abs().max()) > 0
    scale = float(expected.abs().max())
    torch.testing.assert_close(chunked / scale, expected / scale, rtol=0, atol=1e-4)
