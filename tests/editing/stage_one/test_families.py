"""Stage I through the generator of every family: prompts, reference images, balances and erasures."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from editing.edits import (
    Balance,
    ConceptEdit,
    Destination,
    DestinationPrompt,
    Erasure,
    ReferenceImages,
    StageOneSettings,
)
from editing.pipelines import EditablePipeline, load_pipeline
from editing.stage_one.optimize import optimize_values
from editing.values import EditValue
from tests.families import TEXTS
from tests.generators import write_whole_pipeline

pytestmark = pytest.mark.slow

QUICK = StageOneSettings(
    optimization_steps=5, warmup_steps=2, num_images=2, num_inference_steps=2, noise_pool_size=4, noise_batch_size=2
)
DESTINATIONS: dict[str, Destination] = {
    "prompt": DestinationPrompt("red hat"),
    "images": ReferenceImages((Image.new("RGB", (16, 16), "orange"),)),
    "balance": Balance({"red hat": 1.0, "sea": 2.0}),
    "erasure": Erasure(),
}


@pytest.fixture(scope="module", params=TEXTS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EditablePipeline:
    folder: Path = write_whole_pipeline(tmp_path_factory.mktemp("whole") / request.param, request.param)
    return load_pipeline(folder)


def test_values_are_found_in_every_encoder(whole: EditablePipeline) -> None:
    edits = [ConceptEdit("cat", each, templates=("a {} on it", "{}"), settings=QUICK) for each in DESTINATIONS.values()]
    outcomes = optimize_values(whole, edits)
    for destination, value in zip(DESTINATIONS, outcomes, strict=True):
        assert isinstance(value, EditValue), (destination, value)
        assert value.encoders.keys() == {encoder.name for encoder in whole.encoders}
        assert all(torch.isfinite(part.delta).all() and part.delta.any() for part in value.encoders.values())
        assert value.noise_losses and bool(value.text_losses) == (destination != "images")


def test_noise_loss_alone_reaches_every_encoder(whole: EditablePipeline) -> None:
    """The gradient of the generator's loss gets through the condition of each family."""
    settings = StageOneSettings(
        objective="noise",
        optimization_steps=1,
        num_images=1,
        num_inference_steps=2,
        noise_pool_size=2,
        noise_batch_size=2,
    )
    (value,) = optimize_values(whole, [ConceptEdit("cat", DestinationPrompt("red hat"), settings=settings)])
    assert isinstance(value, EditValue)
    for name, part in value.encoders.items():
        assert part.delta.any(), name
