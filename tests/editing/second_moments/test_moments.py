"""The file of second moments, of one encoder and of two."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from editing.errors import EditingError, InvalidEdit
from editing.pipelines import EditablePipeline
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.moments import SecondMoments

CAPTIONS = ("a cat", "the old tree in the sea", "dog", "x " * 60)


class TestFile:
    def test_read_moments_equal_written_moments(self, second_moments: SecondMoments, tmp_path: Path) -> None:
        second_moments.save(tmp_path / "moments.safetensors")
        again = SecondMoments.load(tmp_path / "moments.safetensors")
        assert (again.captions, again.tokens) == (second_moments.captions, second_moments.tokens)
        for layer, moment in second_moments.moments.items():
            assert torch.equal(again.moments[layer], moment)
        assert again.digest == second_moments.digest

    def test_file_has_one_float32_tensor_per_layer_and_one_metadata_string(self, second_moments: SecondMoments) -> None:
        content = second_moments.to_bytes()
        assert content == second_moments.to_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        assert list(header.pop("__metadata__")) == ["second_moments"]
        assert set(header) == {"layer_0", "layer_1", "layer_2"}
        assert {entry["dtype"] for entry in header.values()} == {"F32"}
        assert {tuple(entry["shape"]) for entry in header.values()} == {(64 * 65 // 2,)}

    def test_whole_matrices_are_read(self, second_moments: SecondMoments, tmp_path: Path) -> None:
        """The layout of files written before only the triangle was kept."""
        whole = {f"layer_{layer}": moment.float() for layer, moment in second_moments.moments.items()}
        facts = {"captions": second_moments.captions, "tokens": second_moments.tokens}
        save_file(whole, tmp_path / "whole.safetensors", metadata={"second_moments": json.dumps(facts)})
        assert SecondMoments.load(tmp_path / "whole.safetensors").digest == second_moments.digest

    def test_file_without_counts_is_read(self, tmp_path: Path) -> None:
        save_file({"layer_10": torch.eye(3), "layer_2": torch.eye(3)}, tmp_path / "plain.safetensors")
        moments = SecondMoments.load(tmp_path / "plain.safetensors")
        assert list(moments.moments) == [2, 10]
        assert moments.tokens == 0

    @pytest.mark.parametrize(
        "tensors",
        [
            {"weight": torch.eye(3)},
            {"layer_0": torch.ones(2, 3)},
            {"layer_0": torch.ones(5)},
            {"layer_0": torch.ones(3, 3).tril()},
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(EditingError, match="no second moments"):
            SecondMoments.load(tmp_path / "other.safetensors")

    def test_truncated_file_is_refused(self, second_moments: SecondMoments, tmp_path: Path) -> None:
        (tmp_path / "cut.safetensors").write_bytes(second_moments.to_bytes()[:-1])
        with pytest.raises(EditingError, match="no second moments"):
            SecondMoments.load(tmp_path / "cut.safetensors")


class TestTwoEncoders:
    @pytest.fixture
    def both(self, sdxl: EditablePipeline) -> SecondMoments:
        return SecondMoments.join([estimate_second_moments(encoder, CAPTIONS) for encoder in sdxl.encoders])

    def test_one_file_holds_both(self, sdxl: EditablePipeline, both: SecondMoments, tmp_path: Path) -> None:
        both.save(tmp_path / "moments.safetensors")
        again = SecondMoments.load(tmp_path / "moments.safetensors")
        assert again.digest == both.digest
        for encoder in sdxl.encoders:
            own, expected = again.select(encoder.name), estimate_second_moments(encoder, CAPTIONS)
            assert (own.encoder, own.other_encoders, own.tokens) == (encoder.name, (), expected.tokens)
            assert tuple(own.moments) == encoder.default_edited_layers
            assert own.digest == expected.digest
            for layer, moment in expected.moments.items():
                assert torch.equal(own.moments[layer], moment)

    def test_keys_name_the_encoder(self, both: SecondMoments) -> None:
        keys = set(load(both.to_bytes()))
        assert keys == {
            *(f"text_encoder.layer_{layer}" for layer in (1, 2, 3)),
            *(f"text_encoder_2.layer_{layer}" for layer in (1, 2, 3, 4, 5)),
        }
        assert set(load(both.select("text_encoder_2").to_bytes())) == {key for key in keys if "encoder_2" in key}

    def test_missing_encoder_is_named(self, second_moments: SecondMoments) -> None:
        with pytest.raises(InvalidEdit, match="no second moments of text_encoder_2"):
            second_moments.select("text_encoder_2")


def test_keys_of_the_first_encoder_have_no_prefix(emoji_folder: Path) -> None:
    path = emoji_folder / "pipeline" / "second_moments.safetensors"
    assert SecondMoments.load(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()
