import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from demo.art import Art
from demo.concepts import Concept
from demo.llm import train
from demo.llm.transformer import build_transformer
from demo.train.autoencoder import Latents
from demo.train.loop import Schedule
from demo.train.unet import PictureChoice
from tests.demo.llm.conftest import WIDTH

SCHEDULE = Schedule(steps=6, batch=4, rate=1e-3, warmup=2, checkpoint_every=3, sample_every=3)


def encode(texts: Sequence[str]) -> list[Tensor]:
    """Random states that are equal for equal texts, as many as the text has words."""
    return [
        torch.randn(len(text.split()) + 1, WIDTH, generator=torch.Generator().manual_seed(len(text))) for text in texts
    ]


def model() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    return build_transformer(caption_width=WIDTH, width=64, heads=2, layers=1)


@pytest.fixture
def data(art: Art, concepts: list[Concept], tmp_path: Path) -> train.TrainingData:
    latents = Latents(torch.randn(len(art), 2, 4, 8, 8), torch.ones(len(art), 2, 4, 8, 8))
    captions = train.draw_captions(concepts, count=20)
    encoded = encode([caption.text for caption in captions])
    return train.TrainingData(captions, encoded, encode([""])[0], latents, PictureChoice(art, concepts))


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


def test_training_lowers_the_loss(data: train.TrainingData, tmp_path: Path) -> None:
    schedule = dataclasses.replace(SCHEDULE, steps=40, rate=1e-2, sample_every=20)
    train.train(model(), data, tmp_path, schedule=schedule)
    lines = (tmp_path / f"{train.NAME}.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (json.loads(line)["loss"] for line in lines)
    assert last < first


def test_texts_are_encoded_once_and_again_when_they_change(tmp_path: Path) -> None:
    loaded: list[str] = []

    def load() -> train.Encode:
        loaded.append("encoder")
        return encode

    texts = [f"{number} " * (number % 7) for number in range(40)]
    for _ in range(2):
        read = train.encode_texts(texts, tmp_path / "texts", load)
        assert len(loaded) == 1
        for states, text in zip(read, texts, strict=True):
            assert torch.allclose(states.float(), encode([text])[0], rtol=1e-3, atol=1e-3)
    assert len(train.encode_texts(texts[1:], tmp_path / "texts", load)) == 39
    assert len(loaded) == 2


def test_some_captions_are_empty(data: train.TrainingData) -> None:
    _, captions = data.batch(torch.Generator().manual_seed(0), 200)
    empty = sum(
        torch.equal(states[:length], data.empty) for states, length in zip(*vars(captions).values(), strict=True)
    )
    assert 8 <= empty <= 40


def test_flow_loss_is_zero_for_the_true_velocity(monkeypatch: pytest.MonkeyPatch, data: train.TrainingData) -> None:
    x0, captions = data.batch(torch.Generator().manual_seed(0), 4)

    def true_velocity(_: object, noised: Tensor, sigmas: Tensor, __: object) -> Tensor:
        sigma = sigmas[:, None, None, None]
        noise = (noised - (1 - sigma) * x0) / sigma
        return x0 - noise

    monkeypatch.setattr(train, "predict_velocity", true_velocity)
    assert train.flow_loss(model(), x0, captions, torch.Generator().manual_seed(0)) < 1e-8


def test_pictures_are_judged_for_both_kinds_of_templates(concepts: list[Concept]) -> None:
    autoencoder = AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4)  # fmt: skip
    probe = train.TemplateProbe.choose(concepts, encode, autoencoder, count=4)
    assert probe.is_held_out.tolist() == [True] * 4 + [False] * 2
    top1, pictures = probe.judge(model().eval())
    assert set(top1) == {"held_out", "trained"} and pictures.shape == (6, 3, 32, 32)


def test_weights_are_exported_in_half_precision(tmp_path: Path) -> None:
    train.export(model(), tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
