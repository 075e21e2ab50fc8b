"""The pieces of the demo: what it posts, how it judges, the picture, the memory that it counts."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from demo.classify import Classes, Confidences
from demo.concepts import read_concepts
from demo.edits import EDITS, FREE_PROMPTS, HELD_OUT, SEEDS, STYLED_CONCEPTS, DemoEdit, held_out
from demo.memory import PeakMemory, descendants, held_mb
from demo.results import (
    ClassifiedPictures,
    PictureRequests,
    PipelinePictures,
    as_images,
    picture_count,
    report_of,
    save_picture,
)
from demo.run import DemoError, run

CLASSES = Classes(("dog", "robot", "wolf", "cat"), ("noto", "twemoji"), ("man", "woman"))


def classified_pictures(
    *, concept: Sequence[float] = (), style: Sequence[float] = (0.5, 0.5), count: int = 2
) -> ClassifiedPictures:
    """Pictures of which the classifier says the same."""
    rows = torch.tensor([list(concept) or [0.25] * 4] * count)
    styles, genders = torch.tensor([list(style)] * count), torch.full((count, 2), 0.5)
    return ClassifiedPictures(torch.zeros(count, 3, 8, 8), Confidences(rows, styles, genders, CLASSES))


class TestEdits:
    def test_all_four_kinds_and_enough(self) -> None:
        assert len(EDITS) >= 12
        assert {edit.kind for edit in EDITS} == {"concept", "alias", "images", "style"}

    def test_the_model_can_show_them(self) -> None:
        """Sources and destinations are what `concepts.txt` says they are: an alias to rectify was never trained."""
        concepts = {concept.name: concept for concept in read_concepts()}
        for edit in EDITS:
            if edit.kind == "concept":
                assert edit.source in concepts
            if edit.kind in ("alias", "images"):
                assert edit.destination is not None
                assert edit.source in concepts[edit.destination].held_out
            if edit.destination is not None:
                assert edit.destination in concepts
        assert set(STYLED_CONCEPTS) <= concepts.keys()

    def test_judged_by_prompts_that_are_no_templates(self) -> None:
        from editing.edits import DEFAULT_TEMPLATES

        assert not {prompt.lower() for prompt in FREE_PROMPTS} & {template.lower() for template in DEFAULT_TEMPLATES}

    def test_held_out_are_touched_by_no_edit(self) -> None:
        names = held_out(read_concepts())
        touched = {name for edit in EDITS for name in (edit.source, edit.destination)}
        assert len(names) == len(set(names)) == HELD_OUT >= 40
        assert not set(names) & touched

    def test_requests_are_accepted_by_the_api(self) -> None:
        from emender.schemas.edits import EditCreate

        for edit in EDITS:
            images = ["sha256:" + "0" * 64] if edit.kind == "images" else []
            accepted = EditCreate.model_validate(edit.request(images=images))
            assert accepted.source == edit.source
        erasure = next(c for c in EDITS if c.kind == "style").request()
        assert erasure["destination"] == {"erase": True, "neutral": "art"}


class TestJudge:
    def test_every_prompt_with_every_seed(self) -> None:
        requests = PictureRequests.of(["a", "b"])
        assert requests.prompts == ("a", "b") * len(SEEDS)
        assert requests.seeds == tuple(seed for seed in SEEDS for _ in "ab")

    def test_report(self) -> None:
        """A concept, an alias (judged against what the base model drew for it) and a style."""
        edits = (
            DemoEdit("concept", "dog", "robot", "test"),
            DemoEdit("alias", "lupine animal", "wolf", "test"),
            DemoEdit("style", "twemoji", None, "test"),
        )
        before = PipelinePictures(
            (
                classified_pictures(concept=(0.9, 0.05, 0.05, 0.0)),
                classified_pictures(concept=(0.2, 0.0, 0.1, 0.7)),
                classified_pictures(style=(0.1, 0.9)),
            ),
            {"cat": classified_pictures(concept=(0.0, 0.0, 0.0, 1.0))},
        )
        after = PipelinePictures(
            (
                classified_pictures(concept=(0.1, 0.8, 0.1, 0.0)),
                classified_pictures(concept=(0.0, 0.0, 0.9, 0.1)),
                classified_pictures(style=(0.7, 0.3)),
            ),
            {"cat": classified_pictures(concept=(0.1, 0.0, 0.0, 0.9))},
        )
        report = report_of(edits, before=before, after=after)
        dog, alias, style = report["edits"]
        assert (dog["source"], dog["destination"], dog["kind"]) == ("dog", "robot", "concept")
        assert dog["before"] == pytest.approx({"source": 0.9, "destination": 0.05})
        assert dog["after"] == pytest.approx({"source": 0.1, "destination": 0.8})
        assert alias["before"] == pytest.approx({"source": 0.7, "destination": 0.1})
        assert alias["after"] == pytest.approx({"source": 0.1, "destination": 0.9})
        assert style["destination"] is None
        assert style["before"] == {"source": pytest.approx(0.9), "destination": None}
        assert style["after"] == {"source": pytest.approx(0.3), "destination": None}
        assert report["holdout"] == pytest.approx({"before": 1.0, "after": 0.9})

    def test_picture_count(self) -> None:
        assert picture_count(EDITS, ["cat"] * 40) == len(SEEDS) * (5 * len(EDITS) + 40)

    def test_images(self) -> None:
        picture = as_images(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1))[0]
        assert picture.getpixel((0, 0)) == (0, 128, 255)

    def test_picture_is_saved(self, tmp_path: Path) -> None:
        names = [f"concept {number}" for number in range(20)]
        sides = [
            PipelinePictures(
                tuple(classified_pictures(count=10) for _ in EDITS), {name: classified_pictures() for name in names}
            )
            for _ in range(2)
        ]
        save_picture(tmp_path / "grid.png", EDITS, before=sides[0], after=sides[1], title="test")
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.width > 1000
            assert grid.height > 80 * (len(EDITS) + 4)


class TestPeakMemory:
    def test_counts_children(self) -> None:
        """A child that holds 80 MB shows in the sum, and is gone from it afterwards."""
        code = "import sys; held = bytearray(b'x' * 80_000_000); print('ready', flush=True); sys.stdin.read()"
        with PeakMemory(interval=0.05) as memory:
            child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            assert child.pid in descendants(child.pid)
            assert held_mb(child.pid) > 80
            child.communicate()
        assert memory.peak_mb > 80
        assert held_mb(child.pid) == 0


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="holds no model"):
        run(tmp_path / "out", weights=tmp_path)
    assert not (tmp_path / "out" / "report.json").exists()
