"""The benchmark of caption counts, with a handful of pictures of the emoji model."""

import json

import pytest

from benchmarks import captions
from demo.concepts import WEIGHTS, read_concepts

TINY = ["--edits", "2", "--held-out", "2", "--seeds", "1", "--steps", "2", "--picture-steps", "2"]


def test_roles_are_distinct_and_the_seeds_choice() -> None:
    concepts = read_concepts()
    task = captions.choose(concepts, seed=1, edits=30, held_out=60)
    named = [name for pair in task.pairs for name in pair] + list(task.held_out)
    assert len(named) == len(set(named)) == 120
    assert task == captions.choose(concepts, seed=1, edits=30, held_out=60)
    assert task != captions.choose(concepts, seed=2, edits=30, held_out=60)


def test_f1_is_the_mean_of_both() -> None:
    assert captions.Score(s2d=0.9, hd=-0.1).f1 == pytest.approx(0.4)


@pytest.mark.skipif(not (WEIGHTS / "pipeline" / "model_index.json").is_file(), reason="no emoji model here")
def test_a_row_for_each_count(capsys: pytest.CaptureFixture[str]) -> None:
    """Two captions give moments without an inverse, which the table says; more give scores."""
    captions.main(["--counts", "500", "2", *TINY])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["none: no edit", "2", "500"]
    assert "no inverse" in lines[3] and "no inverse" not in lines[4]
    none, singular, estimated = json.loads(last)["rows"]
    assert none["scores"][0]["hd"] == 0 and singular["scores"] == []
    (score,) = estimated["scores"]
    assert 0 <= score["s2d"] <= 1 and -1 <= score["hd"] <= 1
    assert score["hd"] != 0 and score["s2d"] != none["scores"][0]["s2d"]
