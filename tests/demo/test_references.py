"""Names that the model does not know, shown to it by pictures: eight at once, judged by other prompts and seeds."""

from pathlib import Path

import pytest

from demo.concepts import WEIGHTS
from demo.references import as_table, run

pytestmark = pytest.mark.skipif(
    not (WEIGHTS / "pipeline" / "model_index.json").is_file(), reason="the emoji model is not in demo/weights"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_names_at_once_are_drawn_as_the_pictures_show(tmp_path: Path) -> None:
    report = run()
    assert len(report["names"]) == 8 and report["pictures"] == 3
    assert all(row["before"] < 0.2 for row in report["names"].values())
    assert report["rise"]["mean"] >= 0.70
    assert sum(row["after"] - row["before"] >= 0.70 for row in report["names"].values()) >= 7
    assert report["held_out"]["after"] > report["held_out"]["before"] - 0.03
    assert f"| silverback | gorilla | {report['names']['silverback']['before']:.3f} |" in as_table(report)
