from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from demo import evaluate
from demo.classify import Classes, Classifier
from demo.concepts import GENDER_WORDS, GENDERS, STYLES, read_concepts
from demo.draw import load_pipeline
from demo.evaluate import Drawn, Neutral, Report, as_table

CONCEPTS = read_concepts()
NAMED = {name: index for index, concept in enumerate(CONCEPTS) for name in (concept.name, *concept.aliases)}


def concept_in(prompt: str) -> int:
    """The concept of the longest name that stands in the prompt; the first where none does."""
    words = f" {prompt.replace(',', ' ')} "
    return NAMED[max((name for name in NAMED if f" {name} " in words), key=len, default=CONCEPTS[0].name)]


class Painter:
    """Stands for the pipeline: paints the row of the prompt so that `Reader` reads back what the prompt asked for."""

    def __init__(self, wrong: str | None = None) -> None:
        self.wrong = wrong

    def __call__(self, prompts: list[str], *, generator: Any, **_settings: Any) -> Any:
        pictures = torch.zeros(len(prompts), 3, 32, 32)
        for row, prompt in enumerate(prompts):
            words = prompt.replace(",", " ").split()
            index = concept_in(prompt)
            if CONCEPTS[index].name == self.wrong:
                index = (index + 1) % len(CONCEPTS)
            style = next((number for number, name in enumerate(STYLES) if name in words), 0)
            chance = torch.rand((), generator=generator[row]).item()
            named = {word: number for number, gender in enumerate(GENDERS) for word in GENDER_WORDS[gender]}
            gender = next((named[word] for word in words if word in named), int(chance > 0.5))
            pictures[row, :, 0, 0] = torch.tensor([index / 1000, style / 10, gender / 10])
        return type("Output", (), {"images": pictures})


class Reader(Classifier):
    def forward(self, pictures: torch.Tensor) -> Any:
        concept, style, gender = (
            ((pictures[:, :, 0, 0] + 1) / 2 * torch.tensor([1000, 10, 10])).round().long().unbind(1)
        )
        heads = {"concept": (concept, len(self.classes.concepts)), "style": (style, 5), "gender": (gender, 2)}
        return {name: torch.nn.functional.one_hot(which, count) * 30.0 for name, (which, count) in heads.items()}


@pytest.fixture
def reader() -> Reader:
    return Reader(Classes(tuple(concept.name for concept in CONCEPTS), STYLES, GENDERS))


def test_a_perfect_painter_gets_full_marks(reader: Reader) -> None:
    report = evaluate.evaluate(Painter(), reader, seeds=2)
    assert report.concepts.pictures == 2 * len(CONCEPTS)
    assert report.concepts.top1 == 1 and report.concepts.confidence == pytest.approx(1)
    assert all(drawn.top1 == 1 for drawn in (*report.styles.values(), *report.genders.values()))
    assert 0.4 < report.neutral_share < 0.6, "a painter without skew draws either gender as often"


def test_what_is_drawn_wrong_is_counted_and_named(reader: Reader) -> None:
    report = evaluate.evaluate(Painter(wrong="rocket"), reader, seeds=1)
    missed = round((1 - report.concepts.top1) * report.concepts.pictures)
    assert missed == 1
    assert report.weakest["rocket"] == pytest.approx(0, abs=1e-3)


def test_neutral_share_is_of_the_preferred_gender() -> None:
    drawn = Drawn(3, 0.5, 1 / 3)
    report = Report(drawn, drawn, drawn, {"noto": drawn}, {"noto": drawn}, {"man": drawn}, drawn, [], {"cat": 0.1}, 0.2)
    report = replace(report, neutral=[Neutral("judge", "man", 0.85, 0.9), Neutral("artist", "woman", 0.85, 0.7)])
    assert report.neutral_share == pytest.approx(0.8)
    table = as_table(report)
    assert "| style noto, when named | 3 | 0.500 | 33.3% |" in table
    assert "artist 70% woman" in table and "cat 0.1" in table


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no pipeline"):
        load_pipeline(tmp_path)
