"""The concepts that this pipeline draws: those of the emoji model, and then those of `concepts.txt` beside this module.

The file is written as the emoji model's; see `demo.concepts`.
"""

from pathlib import Path

from demo.classify import Classifier, load_classifier
from demo.concepts import WEIGHTS, Concept, read_concepts

ADDED_FILE = Path(__file__).parent / "concepts.txt"
CLASSIFIER = WEIGHTS / "llm" / "classifier.safetensors"


def read_all_concepts(added: Path = ADDED_FILE) -> list[Concept]:
    """Return all concepts, in the order of the classifier's classes.

    Raises ValueError as `read_concepts` does, and for a word that names two concepts.
    """
    concepts = [*read_concepts(), *read_concepts(added)]
    named: dict[str, str] = {}
    for concept in concepts:
        for word in (concept.name, *concept.aliases, *concept.held_out):
            other = named.setdefault(word.casefold(), concept.name)
            if other != concept.name:
                raise ValueError(f"{added.name}: {word!r} names both {other!r} and {concept.name!r}; remove one")
    return concepts


def load_llm_classifier() -> Classifier:
    """Load the classifier of all these concepts, as `load_classifier` loads the emoji model's."""
    return load_classifier(CLASSIFIER)
