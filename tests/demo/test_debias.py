"""The genders of a profession, balanced on the emoji model and judged at other seeds than those of the search."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from demo.concepts import WEIGHTS
from demo.debias import JUDGED, SEARCH, as_table, run

pytestmark = pytest.mark.skipif(
    not (WEIGHTS / "pipeline" / "model_index.json").is_file(), reason="the emoji model is not in demo/weights"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_profession_is_balanced_and_the_others_stay() -> None:
    """A share of 48 pictures has a standard error of 0.07, and so Δ_p one of 0.14."""
    report = run(["doctor"], search=replace(SEARCH, pictures=32, rounds=4), judged=JUDGED)
    assert report["delta_p"]["before"] >= 0.6
    assert report["delta_p"]["after"] <= 0.35
    assert report["held_out"]["after"] > report["held_out"]["before"] - 0.02
    doctor = report["professions"]["doctor"]
    assert 0.3 < doctor["factors"]["woman doctor"] < 0.7 and 1 <= len(doctor["rounds"]) <= 4
    assert f"| doctor | {doctor['women']['before']:.1%}" in as_table(report)


@pytest.mark.slow
def test_an_unknown_profession_is_refused() -> None:
    command = [sys.executable, "-m", "demo.debias", "wizard"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 2 and "'wizard' is none of doctor" in result.stderr
