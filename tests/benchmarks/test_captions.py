"""The benchmark of caption counts, with a handful of pictures of the emoji model."""

import json

import pytest

from benchmarks import captions
from demo.concepts import WEIGHTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (WEIGHTS / "pipeline" / "model_index.json").is_file(), reason="no emoji model here"),
]

TINY = ["--edits", "2", "--held-out", "2", "--seeds", "1", "--steps", "2", "--picture-steps", "2"]


def test_a_row_for_each_count(capsys: pytest.CaptureFixture[str]) -> None:
    """Two captions give moments without an inverse, which the table says; more give scores."""
    captions.main(["--counts", "500", "2", *TINY])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["2", "500"]
    assert "no inverse" in lines[2] and "no inverse" not in lines[3]
    singular, estimated = json.loads(last)["rows"]
    assert singular["scores"] == []
    (score,) = estimated["scores"]
    assert 0 < abs(score["s2d_free"]) <= 1 and 0 < abs(score["hd"]) <= 1
