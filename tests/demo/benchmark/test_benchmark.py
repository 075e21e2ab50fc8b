from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import pytest

from demo.benchmark import SEEDS, EmojiEdition, load
from demo.benchmark.build import FREE_PROMPTS
from demo.concepts import read_concepts
from demo.emoji import GUIDANCE, STEPS
from editing.edits import DEFAULT_TEMPLATES
from editing.errors import TaskUnreadable
from editing.evaluation.benchmark import GROUP
from editing.evaluation.iceb import Means, Scores, Task
from editing.evaluation.runner import Unit, measure_unit

EDITION = EmojiEdition()
KNOWN = {concept.name for concept in read_concepts()}


@pytest.mark.parametrize("name", ["arbitrary", "rectification"])
def test_small_tasks_are_part_of_large_ones(name: Any) -> None:
    largest = EDITION.build_task(name, edits=EDITION.count_edits(name), seed=1)
    for edits in (1, 10, 30):
        task = EDITION.build_task(name, edits=edits, seed=1)
        assert task.cases == largest.cases[:edits] and task.held_out == largest.held_out
    assert largest.cases != EDITION.build_task(name, edits=EDITION.count_edits(name), seed=2).cases


def test_scales() -> None:
    assert EDITION.count_edits("arbitrary") == 152
    assert EDITION.count_edits("rectification") == 74


@pytest.mark.parametrize("seed", range(SEEDS))
def test_arbitrary_editing(seed: int) -> None:
    task = EDITION.build_task("arbitrary", edits=152, seed=seed)
    sources, held_out = {case.source for case in task.cases}, {concept.name for concept in task.held_out}
    assert len(sources) == len(held_out) == 152 and not sources & held_out
    assert {case.destination for case in task.cases} <= held_out
    assert all(case.source == case.source_class for case in task.cases)
    assert task.list_classes() <= KNOWN
    for case in task.cases:
        assert tuple(prompt.text for prompt in case.templates) == DEFAULT_TEMPLATES
        assert len({prompt.text for prompt in case.free}) == 5
        assert {prompt.text for prompt in case.free} <= set(FREE_PROMPTS)
    assert task.build_edits()[0].settings.guidance_scale == GUIDANCE


@pytest.mark.parametrize("seed", range(SEEDS))
def test_rectification(seed: int) -> None:
    task = EDITION.build_task("rectification", edits=74, seed=seed)
    aliases = {alias: concept.name for concept in read_concepts() for alias in concept.held_out}
    assert all(aliases[case.source] == case.destination == case.source_class for case in task.cases)
    assert len({case.source for case in task.cases}) == 74
    assert not {case.destination for case in task.cases} & {concept.name for concept in task.held_out}


def test_what_the_edition_does_not_have() -> None:
    with pytest.raises(TaskUnreadable, match="from 1 to 152 edits of arbitrary editing, not 153"):
        EDITION.build_task("arbitrary", edits=153, seed=0)
    with pytest.raises(TaskUnreadable, match="the seeds 0 … 2, not 3"):
        EDITION.build_task("arbitrary", edits=1, seed=3)


def test_it_is_installed_as_demo() -> None:
    assert entry_points(group=GROUP)["demo"].load() is load


@dataclass(frozen=True)
class Few:
    """The edition with four held-out concepts and values by the text alone, so that a test takes seconds."""

    def build_task(self, name: Any, *, edits: int, seed: int) -> Task:
        task = EDITION.build_task(name, edits=edits, seed=seed)
        return replace(task, held_out=task.held_out[:4], settings=replace(task.settings, objective="text"))


@pytest.mark.slow
def test_two_edits_of_the_emoji_model() -> None:
    benchmark = replace(load(), suite=Few())
    assert benchmark.num_inference_steps == STEPS
    questions = benchmark.suite.build_task("arbitrary", edits=2, seed=0).build_questions()
    found = {  # the base last: the edits are to be taken away again
        method: Means.average(questions, measure_unit(benchmark, Unit("arbitrary", 2, 0, method)).confidences)
        for method in ("destination", "emender", "base")
    }
    base = found["base"]
    assert all(mean is not None and mean > 0.9 for mean in (base.source, base.source_template, base.held_out))
    assert all(mean is not None and mean < 0.1 for mean in (base.destination, base.destination_template, base.alias))
    reached, ours = (Scores.compare(base, found[method]) for method in ("destination", "emender"))
    assert reached.s2d and reached.s2d > 0.9 and reached.sf and reached.sf > 0.9 and reached.hd == 0
    assert ours.s2d_template and ours.s2d and ours.sf and ours.hd
    assert ours.s2d_template > 0.9 and ours.s2d > 0.6 and ours.sf > 0.9 and abs(ours.hd) < 0.1
