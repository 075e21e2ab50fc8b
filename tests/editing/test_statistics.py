"""Second moments: which tokens count, the file, and the factors."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from editing import statistics
from editing.encoders import EditableEncoder
from editing.errors import EditingError, ForeignSums, InvalidEdit, SingularSecondMoment
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

    def test_points_at_a_caption_that_it_cannot_read(self, pipeline: EditablePipeline) -> None:
        with pytest.raises(EditingError) as refusal:
            estimate_second_moments(pipeline.encoder, ["a cat", "a \ud800"])
        assert refusal.value.pointer == "/captions/1"

    def test_is_symmetric(self, second_moments: SecondMoments) -> None:
        assert all(torch.equal(moment, moment.T) for moment in second_moments.moments.values())

    @pytest.mark.parametrize("block", [7, 64])
    def test_does_not_depend_on_the_blocks(
        self, pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch, block: int
    ) -> None:
        whole = estimate_second_moments(pipeline.encoder, CAPTIONS)
        monkeypatch.setattr("editing.statistics._BLOCK", block)
        for layer, moment in estimate_second_moments(pipeline.encoder, CAPTIONS).moments.items():
            torch.testing.assert_close(moment, whole.moments[layer], rtol=1e-6, atol=1e-9)

    def test_pads_little(self, pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long and short captions take turns; as they come, a third of the positions would be padding."""
        encoded = positions(pipeline.encoder, monkeypatch)
        moments = estimate_second_moments(pipeline.encoder, ["x", "x " * 30] * 20, batch_size=4)
        assert sum(encoded) == moments.tokens


INTERRUPTED = [f"picture {'x' * (n % 7)} of {n}" for n in range(40)]


class Killed(Exception):
    pass


def positions(encoder: EditableEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each batch that is encoded from now on has, padding with it."""
    encoded: list[int] = []
    embed = encoder.embed

    def noted(ids: Tensor) -> Tensor:
        encoded.append(ids.numel())
        return embed(ids)

    monkeypatch.setattr(encoder, "embed", noted)
    return encoded


class TestPartialSums:
    @pytest.fixture
    def partial(self, pipeline: EditablePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The file of a run in batches of four that was killed after five batches, having saved after each."""

        def kill(read: int) -> None:
            if read == 20:
                raise Killed

        monkeypatch.setattr("editing.statistics._SAVING_SHARE", float("inf"))
        monkeypatch.setattr("editing.statistics._WINDOW", 3)
        path = tmp_path / "sums"
        with pytest.raises(Killed):
            estimate_second_moments(pipeline.encoder, INTERRUPTED, batch_size=4, progress=kill, partial=path)
        assert [file.name for file in tmp_path.iterdir()] == ["sums"]
        return path

    def test_a_killed_run_goes_on_and_gives_the_same_bits(
        self, pipeline: EditablePipeline, partial: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = estimate_second_moments(pipeline.encoder, INTERRUPTED, batch_size=4)
        seen: list[int] = []
        encoded = positions(pipeline.encoder, monkeypatch)
        resumed = estimate_second_moments(
            pipeline.encoder, iter(INTERRUPTED), batch_size=4, progress=seen.append, partial=partial
        )
        assert resumed.to_bytes() == whole.to_bytes()
        assert seen == [20, 24, 28, 32, 36, 40] and len(encoded) == 5

    def test_a_run_that_was_finished_is_not_done_again(self, pipeline: EditablePipeline, partial: Path) -> None:
        run = partial_run(pipeline.encoder, partial)
        whole, seen = run(INTERRUPTED)
        again, seen_again = run(INTERRUPTED)
        assert (again.to_bytes(), seen_again) == (whole.to_bytes(), [40])
        assert seen == [20, 24, 28, 32, 36, 40]

    @pytest.mark.parametrize(
        "other",
        [
            {"captions": ["a cat", *INTERRUPTED[1:]]},
            {"captions": INTERRUPTED[::-1]},
            {"captions": INTERRUPTED[:18]},
            {"layers": [0, 1]},
            {"batch_size": 5},
        ],
        ids=lambda other: " ".join(other),
    )
    def test_sums_of_another_run_are_refused(
        self, pipeline: EditablePipeline, partial: Path, other: dict[str, object]
    ) -> None:
        kept = partial.read_bytes()
        with pytest.raises(ForeignSums, match="other captions"):
            partial_run(pipeline.encoder, partial)(**({"captions": INTERRUPTED} | other))
        assert partial.read_bytes() == kept

    def test_sums_of_another_encoder_are_refused(self, pipeline: EditablePipeline, partial: Path) -> None:
        weight = pipeline.encoder.fc2(1).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] += 1e-3
        try:
            with pytest.raises(ForeignSums, match="another encoder"):
                partial_run(pipeline.encoder, partial)(INTERRUPTED)
        finally:
            with torch.no_grad():
                weight.copy_(before)

    def test_a_damaged_file_is_refused(self, pipeline: EditablePipeline, partial: Path) -> None:
        for content in (partial.read_bytes()[:-1], b"", pipeline_moments(pipeline)):
            partial.write_bytes(content)
            with pytest.raises(ForeignSums, match="no partial sums"):
                partial_run(pipeline.encoder, partial)(INTERRUPTED)

    def test_saving_takes_a_small_share_of_the_time(
        self, pipeline: EditablePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a clock of which a batch takes one second and saving another: after each save, twenty without."""
        now = [0.0]
        saved: list[int] = []
        save = statistics._PartialSums._save

        def slow(kept: statistics._PartialSums) -> None:
            save(kept)
            saved.append(kept._sums.captions)
            now[0] += 1

        monkeypatch.setattr(statistics._PartialSums, "_save", slow)
        monkeypatch.setattr("editing.statistics.time.monotonic", lambda: now[0])

        def batch_done(_: int) -> None:
            now[0] += 1

        captions = ["a cat"] * 45
        estimate_second_moments(
            pipeline.encoder, captions, batch_size=1, progress=batch_done, partial=tmp_path / "sums"
        )
        assert saved == [1, 21, 41]


def pipeline_moments(pipeline: EditablePipeline) -> bytes:
    return estimate_second_moments(pipeline.encoder, CAPTIONS).to_bytes()


def partial_run(encoder: EditableEncoder, partial: Path) -> Callable[..., tuple[SecondMoments, list[int]]]:
    """Runs with partial sums in batches of four, unless said otherwise; the moments, and the progress seen."""

    def run(captions: list[str], **options: object) -> tuple[SecondMoments, list[int]]:
        seen: list[int] = []
        given: dict[str, object] = {"batch_size": 4, "progress": seen.append, "partial": partial, **options}
        return estimate_second_moments(encoder, captions, **given), seen  # type: ignore[arg-type]

    return run


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
        assert {tuple(entry["shape"]) for entry in header.values()} == {(64 * 65 // 2,)}

    def test_reads_whole_matrices(self, second_moments: SecondMoments, tmp_path: Path) -> None:
        """The layout of files written before only the triangle was kept."""
        whole = {f"layer_{layer}": moment.float() for layer, moment in second_moments.moments.items()}
        facts = {"captions": second_moments.captions, "tokens": second_moments.tokens}
        save_file(whole, tmp_path / "whole.safetensors", metadata={"second_moments": json.dumps(facts)})
        assert SecondMoments.load(tmp_path / "whole.safetensors").digest == second_moments.digest

    def test_reads_a_file_without_counts(self, tmp_path: Path) -> None:
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
    def test_is_a_lower_factor_computed_once(self, second_moments: SecondMoments) -> None:
        factored = FactoredMoments(second_moments)
        factor = factored.factor(1)
        torch.testing.assert_close(factor @ factor.T, second_moments.moments[1], rtol=1e-12, atol=1e-15)
        assert torch.equal(factor, factor.tril())
        assert factored.factor(1) is factor

    def test_refuses_a_singular_moment(self) -> None:
        moments = SecondMoments({0: torch.ones(4, 4, dtype=torch.float64)}, captions=1, tokens=1)
        with pytest.raises(SingularSecondMoment, match="layer 0"):
            FactoredMoments(moments).factor(0)

    def test_names_a_layer_that_is_not_covered(self, second_moments: SecondMoments) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            FactoredMoments(second_moments).factor(3)
        assert refusal.value.pointer == "/layers"


class TestFactorsInAFolder:
    @pytest.fixture
    def path(self, second_moments: SecondMoments, tmp_path: Path) -> Path:
        second_moments.save(tmp_path / "moments.safetensors")
        return tmp_path / "moments.safetensors"

    def test_are_read_back_bit_for_bit_without_the_moments(
        self, second_moments: SecondMoments, path: Path, tmp_path: Path
    ) -> None:
        first = FactoredMoments(path, folder=tmp_path / "factors")
        factor, condition = first.factor(1), first.condition(1)
        assert torch.equal(factor, FactoredMoments(second_moments).factor(1))
        path.unlink()
        again = FactoredMoments(path, folder=tmp_path / "factors", digest=second_moments.digest)
        assert torch.equal(again.factor(1), factor)
        assert (again.factor(1).stride(), again.condition(1)) == (factor.stride(), condition)
        assert condition == pytest.approx(float(torch.linalg.cond(second_moments.moments[1])), rel=1e-2)

    def test_lie_under_the_digest_of_their_moments(self, second_moments: SecondMoments, tmp_path: Path) -> None:
        FactoredMoments(second_moments, folder=tmp_path).factor(1)
        other = SecondMoments({1: 2 * second_moments.moments[1]}, captions=1, tokens=1)
        doubled = FactoredMoments(other, folder=tmp_path).factor(1)
        torch.testing.assert_close(doubled @ doubled.T, other.moments[1])
        assert {str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*.safetensors")} == {
            f"{moments.digest}/text_encoder.layer_1.safetensors" for moments in (second_moments, other)
        }

    @pytest.mark.parametrize("damage", ["cut", "flipped", "another", "no sha256", "condition", "empty"])
    def test_a_damaged_one_is_computed_again(self, second_moments: SecondMoments, tmp_path: Path, damage: str) -> None:
        factored = FactoredMoments(second_moments, folder=tmp_path)
        factor, condition = factored.factor(1), factored.condition(1)
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
        assert torch.equal(again.factor(1), factor)
        assert again.condition(1) == condition
        assert file.read_bytes() == content

    def test_a_singular_moment_leaves_no_file(self, tmp_path: Path) -> None:
        moments = SecondMoments({0: torch.ones(4, 4, dtype=torch.float64)}, captions=1, tokens=1)
        with pytest.raises(SingularSecondMoment, match="layer 0"):
            FactoredMoments(moments, folder=tmp_path).factor(0)
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == []

    def test_names_a_layer_that_the_file_lacks(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidEdit, match="do not cover layer 3"):
            FactoredMoments(path, folder=tmp_path / "factors").factor(3)


def test_condition_number_is_the_ratio_of_the_eigenvalues() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    matrix = rotation @ torch.diag(torch.tensor([1e-5, 1e-3, 1.0, 2.0, 3.0, 50.0], dtype=torch.float64)) @ rotation.T
    assert condition_number(matrix, torch.linalg.cholesky(matrix)) == pytest.approx(5e6, rel=1e-6)
