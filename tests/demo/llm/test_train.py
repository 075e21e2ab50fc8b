import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from demo.art import Art
from demo.captions import Caption
from demo.concepts import Concept
from demo.llm import train
from demo.llm.captions import HELD_OUT, sample
from demo.llm.transformer import Captions, build_transformer
from demo.train.autoencoder import Latents
from demo.train.loop import Schedule
from demo.train.unet import PictureChoice
from tests.demo.llm.conftest import WIDTH

pytestmark = pytest.mark.slow

SCHEDULE = Schedule(steps=6, batch=4, rate=1e-3, warmup=2, checkpoint_every=3, sample_every=3)


def encode(texts: Sequence[str]) -> Captions:
    """Random states that are equal for equal texts, as many as the text has words."""
    return Captions.of(
        [
            torch.randn(len(text.split()) + 1, WIDTH, generator=torch.Generator().manual_seed(len(text)))
            for text in texts
        ]
    )


def model() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    return build_transformer(caption_width=WIDTH, width=64, heads=2, layers=1)


@pytest.fixture
def data(art: Art, concepts: list[Concept], tmp_path: Path) -> train.TrainingData:
    latents = Latents(torch.randn(len(art), 2, 4, 8, 8), torch.ones(len(art), 2, 4, 8, 8))
    chance = random.Random(0)
    captions = [sample(chance, concepts) for _ in range(20)]
    encoded = encode([caption.text for caption in captions])
    return train.TrainingData(
        encoded, train.choose_pictures(captions, PictureChoice(art, concepts)), encode([""]), latents
    )


def test_resumed_training_equals_uninterrupted_training(data: train.TrainingData, tmp_path: Path) -> None:
    whole = train.train(model(), data, tmp_path / "whole", schedule=SCHEDULE)
    halted = dataclasses.replace(SCHEDULE, checkpoint_every=3)

    class Halted(Exception):
        pass

    class HaltingData(train.TrainingData):
        def batch(self, generator: torch.Generator, size: int) -> object:  # type: ignore[override]
            if (tmp_path / "halted" / f"{train.NAME}-state.json").is_file():
                raise Halted
            return super().batch(generator, size)

    with pytest.raises(Halted):
        train.train(model(), HaltingData(**vars(data)), tmp_path / "halted", schedule=halted)
    resumed = train.train(model(), data, tmp_path / "halted", schedule=halted)
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name
    lines = (tmp_path / "halted" / f"{train.NAME}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_lowers_the_loss(data: train.TrainingData, tmp_path: Path, bfloat16: bool) -> None:
    schedule = dataclasses.replace(SCHEDULE, steps=40, rate=1e-2, sample_every=20)
    trained = train.train(model(), data, tmp_path, schedule=schedule, bfloat16=bfloat16)
    lines = (tmp_path / f"{train.NAME}.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(line)["loss"] for line in lines)
    assert last < first
    assert trained.dtype == torch.float32


def test_texts_are_encoded_once_and_again_when_they_change(tmp_path: Path) -> None:
    loaded: list[str] = []

    def load() -> train.Encode:
        loaded.append("encoder")
        return encode

    texts = [f"{number} " * (number % 7) for number in range(40)]
    expected = encode(texts)
    for _ in range(2):
        read = train.encode_texts(texts, tmp_path / "texts", load)
        assert len(loaded) == 1
        assert torch.equal(read.states, expected.states.half()) and torch.equal(read.lengths, expected.lengths)
    assert len(train.encode_texts(texts[1:], tmp_path / "texts", load).lengths) == 39
    assert len(loaded) == 2


def test_pictures_show_what_their_captions_name(art: Art, concepts: list[Concept]) -> None:
    captions = [
        Caption("a {}", "cat", 0),
        Caption("a {} by fluent", "hot dog", 1, style=2),
        Caption("a {}", "woman judge", 2, gender=1),
        Caption("style of {}", "twemoji", None, style=1),
    ]
    cat, hot_dog, judge, any_of_style = train.choose_pictures(captions, PictureChoice(art, concepts))
    assert art.concept[cat].unique().tolist() == [0] and art.style[cat].unique().tolist() == [0, 1, 2]
    assert art.concept[hot_dog].unique().tolist() == [1] and art.style[hot_dog].unique().tolist() == [2]
    assert art.concept[judge].unique().tolist() == [2] and art.gender[judge].unique().tolist() == [1]
    assert art.style[any_of_style].unique().tolist() == [1] and len(art.concept[any_of_style].unique()) > 1


def test_latents_of_a_batch_belong_to_its_captions(data: train.TrainingData) -> None:
    mean = torch.arange(len(data.latents.mean))[:, None, None, None, None].expand_as(data.latents.mean)
    exact = dataclasses.replace(data, latents=Latents(mean.float(), torch.zeros_like(data.latents.std)))
    x0, captions = exact.batch(torch.Generator().manual_seed(0), 100)
    for picture, states, length in zip(x0[:, 0, 0, 0].int().tolist(), captions.states, captions.lengths, strict=True):
        rows = [
            row
            for row, pictures in enumerate(data.pictures)
            if length == data.captions.lengths[row] and torch.equal(states, data.captions.states[row])
        ]
        assert torch.equal(states, data.empty.states[0]) or any(picture in data.pictures[row] for row in rows)


def test_some_captions_are_empty(data: train.TrainingData) -> None:
    _, captions = data.batch(torch.Generator().manual_seed(0), 200)
    is_empty = (captions.states == data.empty.states).all((1, 2)) & (captions.lengths == data.empty.lengths)
    assert 8 <= is_empty.sum() <= 40


def test_flow_loss_is_zero_for_the_true_velocity(monkeypatch: pytest.MonkeyPatch, data: train.TrainingData) -> None:
    x0, captions = data.batch(torch.Generator().manual_seed(0), 4)

    def true_velocity(_: object, noised: Tensor, sigmas: Tensor, __: object) -> Tensor:
        sigma = sigmas[:, None, None, None]
        noise = (noised - (1 - sigma) * x0) / sigma
        return x0 - noise

    monkeypatch.setattr(train, "predict_velocity", true_velocity)
    assert train.flow_loss(model(), x0, captions, torch.Generator().manual_seed(0)) < 1e-8


def test_pictures_are_judged_for_both_kinds_of_templates(
    monkeypatch: pytest.MonkeyPatch, concepts: list[Concept]
) -> None:
    prompts, wanted = train.probe_prompts(concepts, count=4)
    held_out = {template.format(concept.name) for template in HELD_OUT for concept in concepts}
    assert [prompt in held_out for prompt in prompts] == [True] * 4 + [False] * 2
    autoencoder = AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4)  # fmt: skip
    confidences = torch.eye(3)[torch.tensor(wanted)]
    confidences[0] = confidences[0].roll(1)
    monkeypatch.setattr(train, "classify", lambda *_: SimpleNamespace(concept=confidences))
    probe = train.TemplateProbe(
        encode(prompts),
        torch.tensor(wanted),
        encode([""]),
        autoencoder,
        None,  # type: ignore[arg-type]
    )
    top1, pictures = probe.judge(model().eval())
    assert top1 == {"held_out": 0.75, "trained": 1.0} and pictures.shape == (6, 3, 32, 32)


def test_weights_are_exported_in_half_precision(tmp_path: Path) -> None:
    train.export(model(), tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
