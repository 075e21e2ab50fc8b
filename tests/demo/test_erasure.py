"""A style erased from the emoji model, and what is left of the others."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo.concepts import WEIGHTS
from demo.erasure import as_table, run

pytestmark = pytest.mark.skipif(
    not (WEIGHTS / "pipeline" / "model_index.json").is_file(), reason="the emoji model is not in demo/weights"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_style_goes_and_the_others_stay() -> None:
    report = run("twemoji", concepts=20)
    erased = report["styles"]["twemoji"]
    assert erased["before"] > 0.6 and erased["after"] < erased["before"] - 0.5
    assert report["held_out_styles"] == max(
        abs(row["after"] / row["before"] - 1) for name, row in report["styles"].items() if name != "twemoji"
    )
    assert report["held_out_styles"] < 0.05  # over 60 pictures of each; docs/evaluation.md has 180
    assert report["held_out"]["after"] > report["held_out"]["before"] - 0.02
    assert f"| twemoji, erased | {erased['before']:.3f} |" in as_table(report)


@pytest.mark.slow
def test_an_unknown_style_is_refused() -> None:
    command = [sys.executable, "-m", "demo.erasure", "cubism"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 2 and "'cubism'" in result.stderr
