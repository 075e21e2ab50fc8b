"""Cholesky factors of second moments, in memory and in a folder; condition numbers."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from editing.errors import InvalidEdit, SingularSecondMoment
from editing.second_moments.factors import FactoredMoments, estimate_condition_number, factorize
from editing.second_moments.moments import SecondMoments


class TestFactoredMoments:
    def test_factor_is_computed_once(self, second_moments: SecondMoments) -> None:
        factored = FactoredMoments(second_moments)
        factor = factored.load_factor(1)
        torch.testing.assert_close(factor @ factor.T, second_moments.moments[1], rtol=1e-12, atol=1e-15)
        assert torch.equal(factor, factor.tril())
        assert factored.load_factor(1) is factor

    def test_singular_moment_is_refused(self) -> None:
        moments = SecondMoments({0: torch.ones(4, 4, dtype=torch.float64)}, captions=1, tokens=1)
        with pytest.raises(SingularSecondMoment, match="layer 0"):
            FactoredMoments(moments).load_factor(0)

    def test_moments_in_memory_are_not_changed(self, second_moments: SecondMoments) -> None:
        before = second_moments.moments[1].clone()
        FactoredMoments(second_moments).load_factor(1)
        assert torch.equal(second_moments.moments[1], before)

    def test_missing_layer_is_named(self, second_moments: SecondMoments) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            FactoredMoments(second_moments).load_factor(3)
        assert refusal.value.pointer == "/layers"


class TestFactorsInAFolder:
    @pytest.fixture
    def path(self, second_moments: SecondMoments, tmp_path: Path) -> Path:
        second_moments.save(tmp_path / "moments.safetensors")
        return tmp_path / "moments.safetensors"

    def test_stored_factor_is_read_bit_for_bit(self, second_moments: SecondMoments, path: Path, tmp_path: Path) -> None:
        first = FactoredMoments(path, folder=tmp_path / "factors")
        factor, condition = first.load_factor(1), first.load_condition(1)
        assert torch.equal(factor, FactoredMoments(second_moments).load_factor(1))
        path.unlink()
        again = FactoredMoments(path, folder=tmp_path / "factors", digest=second_moments.digest)
        assert torch.equal(again.load_factor(1), factor)
        assert (again.load_factor(1).stride(), again.load_condition(1)) == (factor.stride(), condition)
        assert condition == pytest.approx(float(torch.linalg.cond(second_moments.moments[1])), rel=1e-2)

    def test_path_has_the_digest_of_the_moments(self, second_moments: SecondMoments, tmp_path: Path) -> None:
        FactoredMoments(second_moments, folder=tmp_path).load_factor(1)
        other = SecondMoments({1: 2 * second_moments.moments[1]}, captions=1, tokens=1)
        doubled = FactoredMoments(other, folder=tmp_path).load_factor(1)
        torch.testing.assert_close(doubled @ doubled.T, other.moments[1])
        assert {str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*.safetensors")} == {
            f"{moments.digest}/text_encoder.layer_1.safetensors" for moments in (second_moments, other)
        }

    @pytest.mark.parametrize("damage", ["cut", "flipped", "another", "no sha256", "condition", "empty"])
    def test_damaged_factor_is_computed_again(self, second_moments: SecondMoments, tmp_path: Path, damage: str) -> None:
        factored = FactoredMoments(second_moments, folder=tmp_path)
        factor, condition = factored.load_factor(1), factored.load_condition(1)
        (file,) = tmp_path.rglob("text_encoder.layer_1.safetensors")
        content = file.read_bytes()
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        whole = {"factor": factor, "condition": torch.tensor(condition, dtype=torch.float64)}
        match damage:
            case "cut":
                file.write_bytes(content[:-8])
            case "flipped":
                file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
            case "another":
                save_file(whole | {"factor": 2 * factor}, file, metadata=metadata)
            case "no sha256":
                save_file(whole, file)
            case "condition":
                save_file(whole | {"condition": torch.tensor(1.0).double()}, file, metadata=metadata)
            case "empty":
                file.write_bytes(b"")
        again = FactoredMoments(second_moments, folder=tmp_path)
        assert torch.equal(again.load_factor(1), factor)
        assert again.load_condition(1) == condition
        assert file.read_bytes() == content

    def test_singular_moment_writes_no_file(self, tmp_path: Path) -> None:
        moments = SecondMoments({0: torch.ones(4, 4, dtype=torch.float64)}, captions=1, tokens=1)
        with pytest.raises(SingularSecondMoment, match="layer 0"):
            FactoredMoments(moments, folder=tmp_path).load_factor(0)
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == []

    def test_layer_missing_in_the_file_is_named(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidEdit, match="no second moments of layer 3"):
            FactoredMoments(path, folder=tmp_path / "factors").load_factor(3)


def test_factor_in_place_takes_the_memory_of_the_matrix_and_has_the_same_bits(second_moments: SecondMoments) -> None:
    matrix = second_moments.moments[1].clone()
    expected = factorize(second_moments.moments[1])
    found = factorize(matrix, in_place=True)
    assert found is not None and expected is not None
    assert found.data_ptr() == matrix.data_ptr()
    assert found.is_contiguous() and expected.is_contiguous()
    assert torch.equal(found, expected)


def test_condition_number_is_the_ratio_of_the_eigenvalues() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    matrix = rotation @ torch.diag(torch.tensor([1e-5, 1e-3, 1.0, 2.0, 3.0, 50.0], dtype=torch.float64)) @ rotation.T
    assert estimate_condition_number(torch.linalg.cholesky(matrix)) == pytest.approx(5e6, rel=1e-6)
