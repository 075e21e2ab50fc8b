"""Estimates of second moments: which tokens count, and a run that was killed going on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editing.encoders.base import TextEncoder
from editing.errors import EditingError, ForeignSums
from editing.pipelines import EditablePipeline
from editing.second_moments import estimate as statistics
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.moments import SecondMoments

CAPTIONS = ("a cat", "the old tree in the sea", "dog", "x " * 60)


def keys_by_hook(encoder: TextEncoder, prompt: tuple[int, ...], *, layer: int) -> Tensor:
    """What fc2 reads in the library's own forward pass over one prompt alone, (tokens, m) float64."""
    seen: list[Tensor] = []
    hook = encoder.output_matrix(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder.model(torch.tensor([prompt]))
    hook.remove()
    return seen[0][0].double()


class TestEstimate:
    def test_moment_is_the_mean_over_every_token(self, pipeline: EditablePipeline) -> None:
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

    @pytest.mark.parametrize("batch_size", [1, 64])
    def test_truncated_captions_are_counted(self, pipeline: EditablePipeline, batch_size: int) -> None:
        moments = estimate_second_moments(pipeline.encoder, [*CAPTIONS, "y " * 100], layers=[0], batch_size=batch_size)
        limit = pipeline.encoder.tokenizer.max_length
        assert moments.truncated == sum(len(caption.split()) + 2 > limit for caption in CAPTIONS) + 1

    def test_batch_size_does_not_change_the_result(self, pipeline: EditablePipeline) -> None:
        one = estimate_second_moments(pipeline.encoder, CAPTIONS, batch_size=1)
        all_ = estimate_second_moments(pipeline.encoder, CAPTIONS, batch_size=64)
        for layer, moment in one.moments.items():
            torch.testing.assert_close(moment, all_.moments[layer], rtol=1e-4, atol=1e-8)

    def test_captions_are_streamed_and_progress_is_reported(self, pipeline: EditablePipeline) -> None:
        seen: list[int] = []
        estimate_second_moments(pipeline.encoder, iter(CAPTIONS), batch_size=2, progress=seen.append)
        assert seen == [2, 4]

    def test_refuses_no_captions(self, pipeline: EditablePipeline) -> None:
        with pytest.raises(EditingError, match="no captions"):
            estimate_second_moments(pipeline.encoder, [])

    def test_invalid_caption_is_named(self, pipeline: EditablePipeline) -> None:
        with pytest.raises(EditingError) as refusal:
            estimate_second_moments(pipeline.encoder, ["a cat", "a \ud800"])
        assert refusal.value.pointer == "/captions/1"

    def test_moments_are_symmetric(self, second_moments: SecondMoments) -> None:
        assert all(torch.equal(moment, moment.T) for moment in second_moments.moments.values())

    @pytest.mark.parametrize("block", [7, 64])
    def test_block_size_does_not_change_the_result(
        self, pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch, block: int
    ) -> None:
        whole = estimate_second_moments(pipeline.encoder, CAPTIONS)
        monkeypatch.setattr("editing.second_moments.estimate._BLOCK", block)
        for layer, moment in estimate_second_moments(pipeline.encoder, CAPTIONS).moments.items():
            torch.testing.assert_close(moment, whole.moments[layer], rtol=1e-6, atol=1e-9)

    def test_batches_have_little_padding(self, pipeline: EditablePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long and short captions take turns; as they come, a third of the positions would be padding."""
        encoded = positions(pipeline.encoder, monkeypatch)
        moments = estimate_second_moments(pipeline.encoder, ["x", "x " * 30] * 20, batch_size=4)
        assert sum(encoded) == moments.tokens


INTERRUPTED = [f"picture {'x' * (n % 7)} of {n}" for n in range(40)]


class Killed(Exception):
    pass


def positions(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
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

        monkeypatch.setattr("editing.second_moments.estimate._SAVING_SHARE", float("inf"))
        monkeypatch.setattr("editing.second_moments.estimate._WINDOW", 3)
        path = tmp_path / "sums"
        with pytest.raises(Killed):
            estimate_second_moments(pipeline.encoder, INTERRUPTED, batch_size=4, progress=kill, partial=path)
        assert [file.name for file in tmp_path.iterdir()] == ["sums"]
        return path

    def test_resumed_run_gives_the_same_bits(
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

    def test_finished_run_is_not_repeated(self, pipeline: EditablePipeline, partial: Path) -> None:
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
        weight = pipeline.encoder.output_matrix(1).weight
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

    def test_saving_uses_a_small_share_of_the_time(
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
        monkeypatch.setattr("editing.second_moments.estimate.time.monotonic", lambda: now[0])

        def batch_done(_: int) -> None:
            now[0] += 1

        captions = ["a cat"] * 45
        estimate_second_moments(
            pipeline.encoder, captions, batch_size=1, progress=batch_done, partial=tmp_path / "sums"
        )
        assert saved == [1, 21, 41]


def pipeline_moments(pipeline: EditablePipeline) -> bytes:
    return estimate_second_moments(pipeline.encoder, CAPTIONS).to_bytes()


def partial_run(encoder: TextEncoder, partial: Path) -> Callable[..., tuple[SecondMoments, list[int]]]:
    """Runs with partial sums in batches of four, unless said otherwise; the moments, and the progress seen."""

    def run(captions: list[str], **options: object) -> tuple[SecondMoments, list[int]]:
        seen: list[int] = []
        given: dict[str, object] = {"batch_size": 4, "progress": seen.append, "partial": partial, **options}
        return estimate_second_moments(encoder, captions, **given), seen  # type: ignore[arg-type]

    return run
