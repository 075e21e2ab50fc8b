"""The emoji model at hand: its pipeline, the classifier that judges it, and its second moments."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Self

from PIL.Image import Image

import editing
from demo.classify import Classifier, Confidences, classify, load_classifier
from demo.concepts import WEIGHTS, read_concepts
from demo.edits import HELD_OUT, HELD_OUT_PROMPT
from editing.edits import ConceptEdit
from editing.pipelines import EditablePipeline
from editing.second_moments.moments import SecondMoments
from editing.stage_two.update import Update, apply_temporarily, compute_update
from editing.values import EditValue

STEPS, GUIDANCE = 8, 3.0  # what the model draws well with: demo/weights/README.md


@dataclass(frozen=True)
class Emoji:
    pipeline: EditablePipeline
    classifier: Classifier
    moments: SecondMoments

    @classmethod
    def load(cls, weights: Path = WEIGHTS) -> Self:
        """Load the emoji model. Raises FileNotFoundError without its weights."""
        return cls(
            editing.load_pipeline(weights / "pipeline"),
            load_classifier(weights / "classifier.safetensors"),
            SecondMoments.load(weights / "pipeline" / "second_moments.safetensors"),
        )

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Draw a picture for each prompt, from its own seed."""
        return editing.draw_pictures(
            self.pipeline, prompts, seeds=seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )

    def read(self, prompts: Sequence[str], seeds: Sequence[int]) -> Confidences:
        """Return the confidences of the classifier for those pictures."""
        return classify(self.draw(prompts, seeds), self.classifier)

    def values(self, edits: Sequence[ConceptEdit]) -> list[EditValue]:
        """Stage I. Raises the `EditingError` of an edit that fails."""
        found = []
        for outcome in editing.optimize_values(self.pipeline, edits):
            if not isinstance(outcome, EditValue):
                raise outcome
            found.append(outcome)
        return found

    @contextmanager
    def edited(self, edits: Sequence[ConceptEdit]) -> Iterator[Update]:
        """Both stages: the model is edited for as long as the block lasts."""
        update = compute_update(self.pipeline.encoder, edits, self.values(edits), self.moments)
        with apply_temporarily(self.pipeline.encoder, update):
            yield update

    def held_out(self, *, named: Iterable[str]) -> float:
        """Return the mean confidence of concepts that no edit names, drawn by their names, without professions."""
        others = [concept.name for concept in read_concepts() if concept.skew is None and concept.name not in named]
        kept = [others[number * len(others) // HELD_OUT] for number in range(HELD_OUT)]
        read = self.read([HELD_OUT_PROMPT.format(name) for name in kept], range(HELD_OUT))
        return mean(float(read.of_concept(name)[number]) for number, name in enumerate(kept))
