from pathlib import Path

import pytest
import torch

import editing
from demo.classify import load_classifier
from demo.llm.tasks import Task
from demo.sd3 import edit
from demo.sd3.pipeline import ENCODERS

pytestmark = pytest.mark.slow

TASK = Task("concepts", ("dog",), ("fox",), aliases=(), held_out=("cow",), preserved=("goat", "pig"))
SETTINGS = edit.Settings(text_steps=2, noise_steps=2)


@pytest.fixture
def pipeline(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> editing.EditablePipeline:
    monkeypatch.setattr(edit, "STEPS", 2)
    monkeypatch.setattr(edit, "CAPTIONS", 120)
    return edit.load_engine(pipeline_folder, device="cpu")


def test_the_engine_reads_as_many_tokens_as_the_demo_draws_with(pipeline: editing.EditablePipeline) -> None:
    assert pipeline.encode(["a fox"]).states.shape[1] == 24 + 32


def test_all_three_encoders_are_edited_or_one_alone(pipeline: editing.EditablePipeline) -> None:
    edits = edit.build_edits(pipeline, TASK, SETTINGS)
    values = editing.optimize_values(pipeline, edits, layers=SETTINGS.layers)
    updates = edit.compute_updates(pipeline, TASK, edits, values, SETTINGS)

    assert [list(update.layers) for update in updates.values()] == [[0], [0], [0]]

    def encode() -> list[torch.Tensor]:
        with torch.no_grad():
            return [encoder.encode_texts(["a photo of a dog"]).states for encoder in pipeline.encoders]

    plain = encode()
    for names in (ENCODERS, ENCODERS[1:2]):
        with edit.written(pipeline, updates, names):
            changed = [not torch.equal(one, other) for one, other in zip(encode(), plain, strict=True)]
        assert changed == [name in names for name in ENCODERS]
    assert all(torch.equal(one, other) for one, other in zip(encode(), plain, strict=True))


def test_the_report_has_each_choice_of_encoders_against_the_unedited_pipeline(
    pipeline: editing.EditablePipeline,
) -> None:
    report = edit.measure(pipeline, load_classifier(), TASK, SETTINGS, [ENCODERS, ("text_encoder_3",)], batch=8)
    for choice in ("all", "text_encoder_3"):
        after = report[choice]["after"]
        assert report[choice]["s2d"] == after["destination"] - report["before"]["destination"]
        assert report[choice]["hd"] == after["held_out"] - report["before"]["held_out"]
