from dataclasses import asdict

import pytest

from benchmarks.quality import Examiner, Means, arbitrary_editing, compare
from demo.classify import load_classifier
from demo.concepts import WEIGHTS, read_concepts
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.pipelines import load_pipeline
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import compute_update
from editing.values import EditValue


def test_a_task_names_every_concept_once_and_is_the_seed_s() -> None:
    concepts = read_concepts()
    task = arbitrary_editing(concepts, edits=100, seed=1)
    named = [name for pair in task.pairs for name in pair] + list(task.held_out)
    assert len(named) == len(set(named)) == 260
    assert task == arbitrary_editing(concepts, edits=100, seed=1)
    assert task.pairs != arbitrary_editing(concepts, edits=100, seed=2).pairs
    aliases = {alias: concept.name for concept in concepts for alias in concept.aliases}
    destinations = dict(task.pairs)
    assert task.aliases and all(destinations[aliases[alias]] == wanted for alias, wanted in task.aliases)


def test_too_many_edits_for_the_concepts_there_are() -> None:
    with pytest.raises(ValueError, match="want more than"):
        arbitrary_editing(read_concepts(), edits=130, seed=0)


def test_scores_are_the_differences_of_table_3() -> None:
    before = Means(source=0.9, template=0.1, free=0.05, alias=0.02, held_out=0.95)
    after = Means(source=0.2, template=0.8, free=0.65, alias=0.42, held_out=0.85)
    scores = compare(before, after)
    expected = {"sf": 0.7, "s2d_template": 0.7, "s2d_free": 0.6, "al2d": 0.4, "hd": -0.1}
    assert asdict(scores) == pytest.approx(expected)
    assert scores.f1 == pytest.approx(0.25)


@pytest.mark.slow
def test_the_emoji_model_before_and_after_two_edits() -> None:
    pipeline = load_pipeline(WEIGHTS / "pipeline")
    examiner = Examiner(pipeline, load_classifier())
    task = arbitrary_editing(read_concepts(), edits=2, seed=0, held_out=8)
    before = examiner.means(task)
    assert before.source > 0.9 and before.held_out > 0.9
    assert before.template < 0.1 and before.free < 0.1

    settings = StageOneSettings(objective="text", optimization_steps=60)
    edits = [ConceptEdit(source, DestinationPrompt(name), settings=settings) for source, name in task.pairs]
    values = optimize_values(pipeline, edits)
    assert all(isinstance(value, EditValue) for value in values)
    moments = SecondMoments.load(WEIGHTS / "pipeline" / "second_moments.safetensors")
    scores = compare(before, examiner.means(task, compute_update(pipeline.encoder, edits, values, moments)))
    assert scores.s2d_free > 0.7 and scores.sf > 0.7
    assert abs(scores.hd) < 0.1
    assert examiner.means(task) == before  # the update was taken away again
