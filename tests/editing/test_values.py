"""The value of an edit: its file, and mixtures of values."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from editing import ENGINE_VERSION
from editing.errors import EditingError
from editing.values import EditValue, EncoderValue, mix
from tests.editing.values import first, one_encoder


@pytest.fixture
def value() -> EditValue:
    """A value in two encoders of different widths."""
    return EditValue(
        {
            "text_encoder": EncoderValue(2, torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])),
            "text_encoder_2": EncoderValue(5, torch.ones(3), torch.zeros(3)),
        },
        text_losses=(2.0, 1.0),
    )


def test_norms(value: EditValue) -> None:
    assert (first(value).delta_norm, first(value).hidden_norm) == (5.0, 10.0)


class TestFile:
    def test_read_value_equals_written_value(self, value: EditValue) -> None:
        read = EditValue.from_safetensors(value.to_safetensors())
        assert list(read.encoders) == ["text_encoder", "text_encoder_2"]
        assert read.engine_version == ENGINE_VERSION
        for name, own in value.encoders.items():
            assert read.encoders[name].layer == own.layer
            assert read.encoders[name].delta.equal(own.delta) and read.encoders[name].hidden.equal(own.hidden)

    def test_tensors_are_named_by_encoder(self, value: EditValue) -> None:
        tensors = load(value.to_safetensors())
        assert tensors["text_encoder.delta"].tolist() == [3.0, 4.0]
        assert tensors["text_encoder_2.hidden"].tolist() == [0.0, 0.0, 0.0]
        assert len(tensors) == 4

    def test_equal_values_give_equal_bytes(self, value: EditValue) -> None:
        assert value.to_safetensors() == value.to_safetensors()
        assert EditValue.from_safetensors(value.to_safetensors()).to_safetensors() == value.to_safetensors()

    def test_metadata_is_one_string(self, value: EditValue, tmp_path: pytest.TempPathFactory) -> None:
        path = str(tmp_path) + "/value.safetensors"
        with open(path, "wb") as file:
            file.write(value.to_safetensors())
        with safe_open(path, framework="pt") as opened:
            assert list(opened.metadata()) == ["edit_value"]

    @pytest.mark.parametrize(
        "content",
        [b"", b"1234567", b"\xff" * 64, save({"text_encoder.delta": torch.ones(2)})],
        ids=["empty", "short", "long header", "no metadata"],
    )
    def test_other_bytes_are_refused(self, content: bytes) -> None:
        with pytest.raises(EditingError, match="no value"):
            EditValue.from_safetensors(content)

    def test_cut_file_is_refused(self, value: EditValue) -> None:
        with pytest.raises(EditingError, match="no value"):
            EditValue.from_safetensors(value.to_safetensors()[:-1])


class TestMix:
    def test_delta_is_the_weighted_mean_in_every_encoder(self, value: EditValue) -> None:
        other = EditValue(
            {name: EncoderValue(own.layer, own.delta * 5, own.hidden) for name, own in value.encoders.items()},
            text_losses=(4.0, 3.0),
        )
        mixed = mix([value, other], [0.75, 0.25])
        for name, own in value.encoders.items():
            torch.testing.assert_close(mixed.encoders[name].delta, 2 * own.delta)
            assert mixed.encoders[name].hidden.equal(own.hidden)
        assert mixed.text_losses == (2.5, 1.5)
        assert mixed.attributes == (value, other)

    @pytest.mark.parametrize(
        "other",
        [
            one_encoder("text_encoder", 1, torch.ones(2), torch.ones(2)),
            one_encoder("text_encoder", 2, torch.ones(2), torch.zeros(2)),
            one_encoder("text_encoder_2", 2, torch.ones(2), torch.ones(2)),
        ],
        ids=["layer", "source", "encoder"],
    )
    def test_values_of_other_sources_or_layers_are_refused(self, other: EditValue) -> None:
        with pytest.raises(EditingError, match="one source"):
            mix([one_encoder("text_encoder", 2, torch.ones(2), torch.ones(2)), other], [0.5, 0.5])
