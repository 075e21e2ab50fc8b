from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.concepts import WEIGHTS, read_concepts
from demo.train import autoencoder, classifier, text_encoder, tokenizer, unet
from demo.train.export import export_pipeline
from demo.train.loop import Training, trained
from demo.train.unpack import unpack


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked") / "checkpoints"
    unpack(WEIGHTS, folder)
    return folder


def test_exporting_what_was_unpacked_gives_the_committed_weights(unpacked: Path, tmp_path: Path) -> None:
    words = tokenizer.load(unpacked)
    compressor = autoencoder.build()
    compressor.load_state_dict(trained(unpacked, autoencoder.NAME, "model"))
    encoder, drawing = text_encoder.load(words, unpacked), unet.load(unpacked)
    export_pipeline(tmp_path, tokenizer=words, encoder=encoder, autoencoder=compressor, unet=drawing)
    for path in tmp_path.rglob("*.safetensors"):
        committed, exported = load_file(WEIGHTS / "pipeline" / path.relative_to(tmp_path)), load_file(path)
        assert committed.keys() == exported.keys()
        assert all(torch.equal(committed[key], exported[key]) for key in committed), path
    assert not any(parameter.requires_grad for parameter in classifier.load(read_concepts(), unpacked).parameters())


def test_a_stage_goes_on_from_the_unpacked_weights(unpacked: Path) -> None:
    training = Training(
        unpacked,
        text_encoder.EDITABLE,
        {"model": text_encoder.build(tokenizer.load(unpacked))},
        text_encoder.EDITABLE_SCHEDULE,
    )
    assert training.resume() and training.step == 0


def test_checkpoints_are_never_overwritten(unpacked: Path) -> None:
    with pytest.raises(FileExistsError, match="--work"):
        unpack(WEIGHTS, unpacked)
