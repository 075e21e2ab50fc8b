"""The concepts that the emoji model draws, read from `concepts.txt`.

A line is `name | emoji labels | trained aliases | held-out aliases`, alternatives split by `;`. A profession has a
fifth field, `man 85` or `woman 85`: the gender that its neutral caption draws, and how often in a hundred.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
CONCEPTS_FILE = FOLDER / "concepts.txt"
WEIGHTS = FOLDER / "weights"

GENDERS = ("man", "woman")
GENDER_WORDS = {"man": ("man", "male"), "woman": ("woman", "female")}

# The styles that a caption can name; the pictures of the others train the autoencoder and the classifier only.
DRAWN_STYLES = ("noto", "twemoji", "fluent")
STYLES = (*DRAWN_STYLES, "emojione", "noto-v1")


@dataclass(frozen=True)
class Concept:
    """One thing the model draws. `skew` is the share of men that a neutral caption of a profession draws, else None."""

    name: str
    labels: tuple[str, ...]
    aliases: tuple[str, ...]
    held_out: tuple[str, ...]
    skew: float | None = None


def read_concepts(path: Path = CONCEPTS_FILE) -> list[Concept]:
    """All concepts in the file's order, which is the order of the classifier's classes.

    Raises ValueError naming the line where a field is missing, a skew cannot be read or a name comes twice.
    """
    concepts: list[Concept] = []
    names: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("|")]
        if len(fields) not in (4, 5) or not fields[0] or not fields[1]:
            raise ValueError(
                f"{path.name}:{number}: expected 'name | labels | aliases | held-out[ | skew]', got {line!r}"
            )
        if fields[0] in names:
            raise ValueError(f"{path.name}:{number}: {fields[0]!r} is listed twice; merge the two lines")
        names.add(fields[0])
        labels, aliases, held_out = (tuple(filter(None, field.split(";"))) for field in fields[1:4])
        skew = _read_skew(fields[4], where=f"{path.name}:{number}") if len(fields) == 5 else None
        concepts.append(Concept(fields[0], labels, aliases, held_out, skew))
    return concepts


def _read_skew(field: str, *, where: str) -> float:
    gender, _, percent = field.partition(" ")
    if gender not in GENDERS or not percent.isdigit() or not 50 <= int(percent) <= 100:
        raise ValueError(f"{where}: the skew must be 'man N' or 'woman N' with N from 50 to 100, got {field!r}")
    share = int(percent) / 100
    return share if gender == "man" else 1 - share
