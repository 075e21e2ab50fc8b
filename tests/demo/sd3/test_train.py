import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from demo.art import Art
from demo.concepts import Concept
from demo.llm.train import drawn_art
from demo.sd3 import train
from demo.sd3.data import Captions, PictureLabels, Pictures, TrainingData, draw_captions
from demo.sd3.pipeline import T5_LENGTH, Networks
from demo.train.autoencoder import Latents
from tests.demo.sd3.conftest import SHAPE

pytestmark = pytest.mark.slow


@pytest.fixture
def data(
    art: Art, concepts: list[Concept], clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast
) -> TrainingData:
    torch.manual_seed(0)
    art = drawn_art(art)
    mean = torch.randn(len(art), 2, 4, 1, 1).expand(-1, -1, -1, 8, 8)
    latents = Latents(mean, torch.full_like(mean, 0.01))
    labels = PictureLabels(art.concept, art.style, art.gender)
    captions = Captions.tokenize(
        draw_captions(concepts, [concept.name for concept in concepts], count=40), clip_tokenizer, t5_tokenizer
    )
    return TrainingData(captions, Pictures.sort(latents, labels, concepts))


def build(clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast) -> Networks:
    torch.manual_seed(0)
    return Networks(clip_tokenizer, t5_tokenizer, SHAPE)


def run(networks: Networks, data: TrainingData, folder: Path, *, steps: int) -> Networks:
    plan = train.Plan(rate=3e-3, batch=8, steps=steps, warmup=2)
    return train.train(networks, data, folder, plan, pad_id=0, lengths=(T5_LENGTH, T5_LENGTH + 8))


def test_each_encoder_is_left_out_as_often_as_the_others_and_never_all() -> None:
    kept, cumulated = train.build_patterns()
    chances = cumulated.diff(prepend=torch.zeros(1))
    assert kept.any(1).all()
    all_left_out = train.DROPPED_SHARE**3
    expected = (train.DROPPED_SHARE - all_left_out) / (1 - all_left_out)
    for encoder in range(3):
        assert chances[kept[:, encoder] == 0].sum().item() == pytest.approx(expected)


def test_training_lowers_the_loss(
    data: TrainingData, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(train, "LOG_EVERY", 20)
    run(build(clip_tokenizer, t5_tokenizer), data, tmp_path, steps=60)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sd3.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_all_networks_are_trained(
    data: TrainingData, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, tmp_path: Path
) -> None:
    before = build(clip_tokenizer, t5_tokenizer).state_dict()
    after = run(build(clip_tokenizer, t5_tokenizer), data, tmp_path, steps=3)
    for name, parameter in after.named_parameters():
        if "pos" not in name:
            assert not torch.equal(parameter, before[name]), name


def test_interrupted_training_goes_on_where_it_was(
    data: TrainingData, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, tmp_path: Path
) -> None:
    run(build(clip_tokenizer, t5_tokenizer), data, tmp_path, steps=3)
    run(build(clip_tokenizer, t5_tokenizer), data, tmp_path, steps=5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "sd3.jsonl").read_text().splitlines()]
    assert steps == [3, 5]
    assert json.loads((tmp_path / "sd3-state.json").read_text())["step"] == 5


def test_time_ends_the_training_too() -> None:
    plan = train.Plan(rate=1.0, seconds=10.0, steps=100, warmup=1)
    assert plan.progress(20, 5.0) == 0.5
    assert plan.progress(20, 11.0) == 1.0
    assert plan.rate_at(20, 0.5) == pytest.approx(0.5)
    assert plan.rate_at(20, 1.0) == pytest.approx(0.0)


def test_training_begins_with_the_weights_of_a_pipeline(
    networks: Networks, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, pipeline_folder: Path
) -> None:
    read = build(clip_tokenizer, t5_tokenizer)
    read.read(pipeline_folder)
    saved = networks.float().state_dict()  # saving made them float16
    assert all(torch.equal(weight, saved[name]) for name, weight in read.state_dict().items())
