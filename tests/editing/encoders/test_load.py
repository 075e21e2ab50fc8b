"""A text encoder loaded up to its last edited layer gives the update of the whole encoder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from editing.edits import ConceptEdit, DestinationPrompt
from editing.encoders.base import TextEncoder
from editing.encoders.load import load_encoder, load_encoders
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.moments import SecondMoments
from editing.stage_two.update import Update, compute_update
from editing.values import EditValue, EncoderValue
from tests.families import write_text_parts

EDITS = [ConceptEdit(name, DestinationPrompt("a dog")) for name in ("cat", "old tree", "small boat")]
CAPTIONS = [f"{number} cats in the sea near a tree" for number in range(100)]
LAST = 2


@pytest.fixture(scope="module", params=["sd3", "pixart_sigma", "auraflow", "z_image", "qwen_image", "lumina2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_parts(tmp_path_factory.mktemp("load") / request.param, request.param, shard_size="20KB")


@pytest.fixture(scope="module")
def whole(folder: Path) -> TextEncoder:
    return load_encoders(folder)[-1]


@pytest.fixture(scope="module")
def moments(whole: TextEncoder) -> SecondMoments:
    return estimate_second_moments(whole, CAPTIONS, layers=(1, LAST))


def update(encoder: TextEncoder, moments: SecondMoments) -> Update:
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(EDITS), 2, encoder.width, generator=random)
    values = [EditValue({encoder.name: EncoderValue(LAST, delta, hidden)}) for delta, hidden in drawn]
    return compute_update(encoder, EDITS, values, moments, layers=(1, LAST))


class TestUpToALayer:
    def test_the_layers_after_it_are_not_loaded(self, folder: Path, whole: TextEncoder) -> None:
        found = load_encoder(folder, whole.name, last_layer=LAST)
        assert len(found.blocks) == LAST + 1
        assert (found.n_layers, found.value_layer) == (whole.n_layers, whole.value_layer)

    def test_second_moments_and_update_have_the_bits_of_the_whole_encoder(
        self, folder: Path, whole: TextEncoder, moments: SecondMoments
    ) -> None:
        found = load_encoder(folder, whole.name, last_layer=LAST)
        own = estimate_second_moments(found, CAPTIONS, layers=(1, LAST))
        one, two = update(found, own), update(whole, moments)
        for layer in two.layers:
            assert torch.equal(one.to_dense(layer), two.to_dense(layer))

    def test_weights_that_are_left_out_are_not_reported(
        self, folder: Path, whole: TextEncoder, caplog: pytest.LogCaptureFixture
    ) -> None:
        load_encoder(folder, whole.name, last_layer=LAST)
        assert "UNEXPECTED" not in caplog.text

    def test_bfloat16_weights_are_mapped_and_give_the_same_update(
        self, folder: Path, whole: TextEncoder, moments: SecondMoments, tmp_path: Path
    ) -> None:
        rounded = round_weights(shutil.copytree(folder, tmp_path / "rounded"), whole.name)
        mapped = load_encoder(rounded, whole.name, dtype=None, last_layer=LAST)
        model: Any = mapped.model
        assert mapped.folder is not None
        assert is_mapped(model.get_input_embeddings().weight, mapped.folder)
        assert all(is_mapped(weight, mapped.folder) for block in mapped.blocks for weight in block.layer.parameters())
        if whole.family == "lumina2":
            return  # Gemma rounds its scaled embeddings to the dtype of the weights
        one = update(mapped, moments)
        two = update(load_encoder(rounded, whole.name, last_layer=LAST), moments)
        for layer in two.layers:
            assert (one.to_dense(layer) - two.to_dense(layer)).norm() < 1e-5 * two.to_dense(layer).norm()


def round_weights(folder: Path, name: str) -> Path:
    """Round an encoder's weights in its files to bfloat16."""
    for part in sorted((folder / name).glob("*.safetensors")):
        rounded = {key: tensor.bfloat16() for key, tensor in load_file(part).items()}
        part.unlink()  # the old file may be mapped
        save_file(rounded, part, metadata={"format": "pt"})
    config = json.loads((folder / name / "config.json").read_text())
    (folder / name / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def is_mapped(weight: Tensor, folder: Path) -> bool:
    """Return whether a weight's memory is that of a file in the folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= weight.data_ptr() < last:
            return path.startswith(str(folder))
    return False
