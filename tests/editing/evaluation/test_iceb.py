from dataclasses import asdict, replace

import pytest

from editing.edits import DestinationPrompt, StageOneSettings
from editing.evaluation.iceb import Case, Confidences, HeldOut, Means, Prompt, Scores, Task

CAT = Case(
    source="cat",
    destination="dog",
    source_class="cat",
    destination_class="dog",
    templates=(Prompt("a {}", 1), Prompt("{}", 2)),
    free=(Prompt("the {} runs", 1), Prompt("my {}", 2), Prompt("one {}", 3)),
    aliases=("kitten", "puss"),
    alias_prompts=(Prompt("my {}", 2),),
    seed=5,
)
FISH = replace(
    CAT, source="fish", destination="red hat", source_class="fish", destination_class="hat", aliases=(), seed=6
)
HELD_OUT = (HeldOut("bird", (Prompt("a bird", 8), Prompt("the bird", 9))), HeldOut("tree", (Prompt("a tree", 10),)))
TASK = Task("arbitrary", (CAT, FISH), HELD_OUT, StageOneSettings(guidance_scale=3.0))


def test_edits_have_the_models_settings_and_their_own_seeds() -> None:
    first, second = TASK.build_edits()
    assert (first.source, first.destination, first.templates) == ("cat", DestinationPrompt("dog"), ("a {}", "{}"))
    assert first.settings == StageOneSettings(guidance_scale=3.0, seed=5)
    assert second.settings.seed == 6


def test_every_prompt_is_one_question_with_its_seed() -> None:
    asked = [
        (q.part, q.concept, q.prompt, q.destination_prompt, q.seed, q.wanted, q.original)
        for q in TASK.build_questions()
    ]
    assert asked[:2] == [
        ("template", 0, "a cat", "a dog", 1, "dog", "cat"),
        ("template", 0, "cat", "dog", 2, "dog", "cat"),
    ]
    assert asked[4:7] == [
        ("free", 0, "the cat runs", "the dog runs", 1, "dog", "cat"),
        ("free", 0, "my cat", "my dog", 2, "dog", "cat"),
        ("free", 0, "one cat", "one dog", 3, "dog", "cat"),
    ]
    assert asked[7] == ("free", 1, "the fish runs", "the red hat runs", 1, "hat", "fish")
    assert asked[10:] == [
        ("alias", 0, "my kitten", "my dog", 2, "dog", "cat"),
        ("alias", 1, "my puss", "my dog", 2, "dog", "cat"),
        ("held out", 0, "a bird", None, 8, "bird", None),
        ("held out", 0, "the bird", None, 9, "bird", None),
        ("held out", 1, "a tree", None, 10, "tree", None),
    ]
    assert TASK.list_classes() == {"cat", "dog", "fish", "hat", "bird", "tree"}


WANTED = (0.2, 0.4, 0.0, 0.2, 0.1, 0.2, 0.3, 0.6, 0.6, 0.6, 0.3, 0.5, 0.8, 1.0, 0.5)
ORIGINAL = (0.8, 0.6, 1.0, 0.6, 0.9, 0.8, 0.7, 0.4, 0.4, 0.4, 0.1, 0.1, None, None, None)


def test_means_are_over_concepts_of_means_over_their_prompts() -> None:
    means = Means.average(TASK.build_questions(), Confidences(WANTED, ORIGINAL))
    expected = {
        "source_template": (0.7 + 0.8) / 2,
        "source": (0.8 + 0.4) / 2,
        "destination_template": (0.3 + 0.1) / 2,
        "destination": (0.2 + 0.6) / 2,
        "alias": (0.3 + 0.5) / 2,
        "held_out": (0.9 + 0.5) / 2,
    }
    assert asdict(means) == pytest.approx(expected)


def test_concepts_have_equal_weights() -> None:
    uneven = replace(TASK, cases=(replace(CAT, free=CAT.free[:1]), FISH))
    wanted = [1.0 if q.concept == 0 else 0.0 for q in uneven.build_questions()]
    means = Means.average(uneven.build_questions(), Confidences(tuple(wanted), tuple(wanted)))
    assert means.destination == pytest.approx(0.5)


def test_scores_are_the_differences_of_table_3() -> None:
    before = Means(0.9, 0.8, 0.1, 0.05, 0.02, 0.95)
    after = Means(0.3, 0.4, 0.8, 0.65, 0.42, 0.85)
    scores = Scores.compare(before, after)
    expected = {
        "sf_template": 0.6,
        "sf": 0.4,
        "s2d_template": 0.7,
        "s2d": 0.6,
        "al2d": 0.4,
        "hd": -0.1,
    }
    assert asdict(scores) == pytest.approx(expected)
    assert scores.f1 == pytest.approx(0.25)  # (0.6 - 0.1) / 2
    assert Scores.compare(before, before) == Scores(0, 0, 0, 0, 0, 0)


def test_held_out_concepts_that_are_not_drawn_score_zero() -> None:
    before = Means(0.9, 0.8, 0.1, 0.05, 0.02, 0.95)
    scores = Scores.compare(before, Means(0.0, 0.0, 1.0, 1.0, 1.0, None))
    assert scores.hd == 0 and scores.f1 == pytest.approx(0.475)


def test_rectification_has_no_source_forget_score() -> None:
    case = replace(CAT, source="kitty", destination="cat", destination_class="cat", aliases=())
    task = Task("rectification", (case,), HELD_OUT)
    assert {q.original for q in task.build_questions()} == {None}
    answers = Confidences(tuple(0.5 for _ in task.build_questions()), tuple(None for _ in task.build_questions()))
    means = Means.average(task.build_questions(), answers)
    scores = Scores.compare(means, means)
    assert scores.sf is scores.sf_template is scores.al2d is None
    assert scores.s2d == scores.s2d_template == scores.hd == scores.f1 == 0
