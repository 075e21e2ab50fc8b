"""Second moments: which tokens count, the file, and the factors."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from editing.encoders import EditableEncoder
from editing.errors import EditingError, InvalidEdit, SingularSecondMoment
from editing.pipelines import EditablePipeline
from editing.statistics import FactoredMoments, SecondMoments, condition_number, estimate_second_moments

CAPTIONS = ("a cat", "the old tree in the sea", "dog", "x " * 60)


def keys_by_hook(encoder: EditableEncoder, prompt: tuple[int, ...], *, layer: int) -> Tensor:
    """What fc2 reads in the library's own forward pass over one prompt alone, (tokens, m) float64."""
    seen: list[Tensor] = []
    hook = encoder.fc2(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder.model(torch.tensor([prompt]))
    hook.remove()
    return seen[0][0].double()


class TestEstimate:
    def test_is_the_mean_over_every_token(self, pipeline: EditablePipeline) -> None:
        """Against the same sum written out caption by caption: BOS and EOS count, padding does not."""
        encoder = pipeline.encoder
        prompts = [encoder.tokenizer.encode(caption).ids for caption in CAPTIONS]
        tokens = sum(len(prompt) for prompt in prompts)
        moments = estimate_second_moments(encoder, CAPTIONS, layers=[0, 2], batch_size=3)
        assert (moments.captions, moments.tokens) == (len(CAPTIONS), tokens)
        assert list(moments.moments) == [0, 2]
        for layer in (0, 2):
            keys = [keys_by_hook(encoder, prompt, layer=layer) for prompt in prompts]
            expected = sum(key.T @ key for key in keys) / tokens
            torch.testing.assert_close(moments.moments[layer], expected, rtol=1e-4, atol=1e-9)

    def test_does_not_depend_on_the_batches(self, pipeline: EditablePipeline) -> None:
        one = estimate_second_moments(pipeline.encoder, CAPTIONS, batch_size=1)
        all_ = estimate_second_moments(pipeline.encoder, CAPTIONS, batch_size=64)
        for layer, moment in one.moments.items():
            torch.testing.assert_close(moment, all_.moments[layer], rtol=1e-4, atol=1e-8)

    def test_reads_a_stream_and_reports(self, pipeline: EditablePipeline) -> None:
        seen: list[int] = []
        estimate_second_moments(pipeline.encoder, iter(CAPTIONS), batch_size=2, progress=seen.append)
        assert seen == [2, 4]

    def test_refuses_no_captions(self, pipeline: EditablePipeline) -> None:
        with pytest.raises(EditingError, match="no captions"):
            estimate_second_moments(pipeline.encoder, [])


class TestFile:
    def test_reads_back_equal(self, second_moments: SecondMoments, tmp_path: Path) -> None:
        second_moments.save(tmp_path / "moments.safetensors")
        again = SecondMoments.load(tmp_path / "moments.safetensors")
        assert (again.captions, again.tokens) == (second_moments.captions, second_moments.tokens)
        for layer, moment in second_moments.moments.items():
            assert torch.equal(again.moments[layer], moment)
        assert again.digest == second_moments.digest

    def test_has_a_float32_layer_each_and_one_metadata_string(self, second_moments: SecondMoments) -> None:
        content = second_moments.to_bytes()
        assert content == second_moments.to_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        assert list(header.pop("__metadata__")) == ["second_moments"]
        assert set(header) == {"layer_0", "layer_1", "layer_2"}
        assert {entry["dtype"] for entry in header.values()} == {"F32"}

    def test_reads_a_file_without_counts(self, tmp_path: Path) -> None:
        save_file({"layer_10": torch.eye(3), "layer_2": torch.eye(3)}, tmp_path / "plain.safetensors")
        moments = SecondMoments.load(tmp_path / "plain.safetensors")
        assert list(moments.moments) == [2, 10]
        assert moments.tokens == 0

    @pytest.mark.parametrize("tensors", [{"weight": torch.eye(3)}, {"layer_0": torch.ones(2, 3)}])
    def test_refuses_other_files(self, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(EditingError, match="no second moments"):
            SecondMoments.load(tmp_path / "other.safetensors")

    def test_refuses_a_cut_file(self, second_moments: SecondMoments, tmp_path: Path) -> None:
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
            own, expected = again.of(encoder.name), estimate_second_moments(encoder, CAPTIONS)
            assert (own.encoder, own.others, own.tokens) == (encoder.name, (), expected.tokens)
            assert tuple(own.moments) == encoder.default_edited_layers
            assert own.digest == expected.digest
            for layer, moment in expected.moments.items():
                assert torch.equal(own.moments[layer], moment)

    def test_keys_say_the_encoder(self, both: SecondMoments) -> None:
        keys = set(load(both.to_bytes()))
        assert keys == {
            *(f"text_encoder.layer_{layer}" for layer in (1, 2, 3)),
            *(f"text_encoder_2.layer_{layer}" for layer in (1, 2, 3, 4, 5)),
        }
        assert set(load(both.of("text_encoder_2").to_bytes())) == {key for key in keys if "encoder_2" in key}

    def test_names_an_encoder_that_is_not_covered(self, second_moments: SecondMoments) -> None:
        with pytest.raises(InvalidEdit, match="do not cover text_encoder_2"):
            second_moments.of("text_encoder_2")


def test_a_file_of_the_first_encoder_stays_what_it_is(emoji_folder: Path) -> None:
    path = emoji_folder / "pipeline" / "second_moments.safetensors"
    assert SecondMoments.load(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


class TestFactoredMoments:
    def test_solves(self, second_moments: SecondMoments) -> None:
        factored = FactoredMoments(second_moments)
        columns = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            second_moments.moments[1] @ factored.solve(1, columns), columns, rtol=1e-6, atol=1e-6
        )
        assert factored.factor(1) is factored.factor(1)

    def test_refuses_a_singular_moment(self) -> None:
        moments = SecondMoments({0: torch.ones(4, 4, dtype=torch.float64)}, captions=1, tokens=1)
        with pytest.raises(SingularSecondMoment, match="layer 0"):
            FactoredMoments(moments).factor(0)

    def test_names_a_layer_that_is_not_covered(self, second_moments: SecondMoments) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            FactoredMoments(second_moments).factor(3)
        assert refusal.value.pointer == "/layers"


def test_condition_number_is_the_ratio_of_the_eigenvalues() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    matrix = rotation @ torch.diag(torch.tensor([1e-5, 1e-3, 1.0, 2.0, 3.0, 50.0], dtype=torch.float64)) @ rotation.T
    assert condition_number(matrix, torch.linalg.cholesky(matrix)) == pytest.approx(5e6, rel=1e-6)
