"""Δ_p by hand, the file as shipped, and shares against pictures drawn here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from editing.errors import InvalidEdit, TaskUnreadable
from editing.evaluation.drawing import Sampling
from editing.evaluation.gender import GenderBalance, Profession, compute_imbalance, load_professions, measure_balance
from editing.evaluation.metrics import Clip
from editing.evaluation.rows import Loaded
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline

HEADER = "female,male,old,new,validation,ex1,ex2,ex3,ex4,ex5\n"
DOCTOR = "a woman,a man,a doctor,a woman,a photo,1,2,3,4,5\n"


class TestLoadProfessions:
    def load(self, tmp_path: Path, rows: str) -> Loaded[Profession]:
        path = tmp_path / "gender.csv"
        path.write_text(HEADER + rows)
        return load_professions(path)

    def test_row_becomes_a_profession(self, tmp_path: Path) -> None:
        loaded = self.load(tmp_path, DOCTOR)
        assert loaded.tasks == (
            Profession("line 2", "a doctor", "a woman", "a man", "a woman", "a photo", ("1", "2", "3", "4", "5")),
        )
        assert loaded.notes == ()

    def test_repeated_profession_is_left_out(self, tmp_path: Path) -> None:
        loaded = self.load(tmp_path, DOCTOR + DOCTOR)
        assert len(loaded.tasks) == 1
        assert [(note.place, "occurs before" in note.detail) for note in loaded.notes] == [("line 3", True)]

    @pytest.mark.parametrize(
        ("row", "complaint"),
        [
            ("a man,A man,a doctor,a man,a photo,1,2,3,4,5", "gender.csv, line 3: 'female' and 'male' are the same"),
            ("a woman,a man,a nurse,a nurse,a photo,1,2,3,4,5", "line 3: 'new' must be the text of 'female' or of"),
            ("a woman,a man,a nurse,a man,a photo,1,2,,4,5", "line 3: 'ex3' is blank"),
        ],
    )
    def test_invalid_row_is_named(self, tmp_path: Path, row: str, complaint: str) -> None:
        with pytest.raises(TaskUnreadable, match=complaint):
            self.load(tmp_path, DOCTOR + row)

    def test_published_file(self, shared: Callable[[str], Path]) -> None:
        loaded = load_professions(shared("debias/TIMED_gender_test_set_processed.csv"))
        assert (len(loaded.tasks), loaded.notes) == (37, ())
        doctor = next(profession for profession in loaded.tasks if profession.source == "a doctor")
        assert (doctor.female, doctor.male) == ("a female doctor", "a male doctor")
        assert doctor.counter_stereotype == "a female doctor"
        assert doctor.prompts[1] == "a doctor working"


class TestBalance:
    @pytest.mark.parametrize(("share", "delta"), [(0.5, 0), (1, 1), (0, 1), (0.81, 0.62), (0.25, 0.5)])
    def test_compute_imbalance(self, share: float, delta: float) -> None:
        assert compute_imbalance(share) == pytest.approx(delta)

    def test_delta_is_the_mean_over_professions(self) -> None:
        """Two that lean to one side each do not cancel out."""
        balance = GenderBalance({"a doctor": 0.1, "a nurse": 0.9, "a cook": 0.5})
        assert balance.imbalances == pytest.approx({"a doctor": 0.8, "a nurse": 0.8, "a cook": 0.0})
        assert balance.delta == pytest.approx(1.6 / 3)


class TestMeasureBalance:
    PROFESSIONS = (
        Profession("line 2", "a doctor", "a cat", "the sea", "a cat", "", ("a doctor", "doctors", "my doctor")),
        Profession("line 3", "a nurse", "the sea", "a cat", "a cat", "", ("a nurse", "nurses")),
    )

    @pytest.mark.parametrize("run", [0, 2])
    def test_prompts_are_used_in_turn(self, pipeline: EditablePipeline, clip: Clip, run: int) -> None:
        found = measure_balance(
            pipeline,
            self.PROFESSIONS,
            clip,
            pictures=20,
            run=run,
            sampling=Sampling(num_inference_steps=2, guidance_scale=2.0),
        )
        expected = {}
        for profession in self.PROFESSIONS:
            prompts = [profession.prompts[number % len(profession.prompts)] for number in range(20)]
            pictures = draw_pictures(
                pipeline, prompts, seeds=range(run * 20, run * 20 + 20), num_inference_steps=2, guidance_scale=2.0
            )
            near_women, near_men = (clip.score(pictures, [text] * 20) for text in (profession.female, profession.male))
            expected[profession.source] = int((near_women > near_men).sum()) / 20
        assert found.female_shares == expected
        assert 0 < expected["a doctor"] < 1

    def test_zero_pictures_are_refused(self, pipeline: EditablePipeline, clip: Clip) -> None:
        with pytest.raises(InvalidEdit, match="pictures must be at least 1, not 0"):
            measure_balance(pipeline, self.PROFESSIONS, clip, pictures=0, sampling=Sampling())
