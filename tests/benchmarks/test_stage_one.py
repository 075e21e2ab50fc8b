"""The plain loop is the method's, so that its cost may be compared; and the command's report, at tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.stage_one import measure, plain_pictures, plain_value
from demo.concepts import WEIGHTS
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.pipelines import load_pipeline
from editing.stage_one.optimize import optimize_values
from editing.values import EditValue
from tests.editing.values import first
from tests.pipelines import write_pipeline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("objective", ["text", "hybrid"])
def test_the_plain_loop_looks_for_the_same_value(tmp_path: Path, objective: str) -> None:
    pipeline = load_pipeline(write_pipeline(tmp_path / "pipeline"))
    quick = {
        "optimization_steps": 4,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "noise_pool_size": 4,
        "num_images": 3,
    }
    settings = StageOneSettings.preset("published", objective=objective, **quick)
    edit = ConceptEdit("cat", DestinationPrompt("the sea"), settings=settings)
    plain = plain_value(pipeline, edit, pixels=plain_pictures(pipeline, edit), steps=4)
    (ours,) = optimize_values(pipeline, [edit])
    assert isinstance(ours, EditValue)
    assert plain.text_losses[0] == pytest.approx(ours.text_losses[0], rel=1e-4)
    torch.testing.assert_close(first(plain).hidden, first(ours).hidden, rtol=1e-4, atol=1e-4)
    if objective == "text":  # with noise, their pictures differ
        torch.testing.assert_close(first(plain).delta, first(ours).delta, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not (WEIGHTS / "pipeline").is_dir(), reason="the emoji model is not in demo/weights")
class TestCommand:
    def test_fewer_plain_steps_are_reckoned_up(self, tmp_path: Path) -> None:
        cost = measure("text", "plain", concepts=1, plain_steps=2, out=tmp_path / "values.safetensors")
        assert (cost.concepts, cost.steps) == (1, 2)
        assert cost.cpu_seconds > 0

    def test_reports(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.stage_one", "--cases", "text", "--concepts", "2"]
        command += ["--plain-concepts", "1", "--plain-steps", "2", "--json", str(tmp_path / "report.json")]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        lines = done.stdout.splitlines()
        report = json.loads((tmp_path / "report.json").read_text())
        assert json.loads(lines[-1]) == {"text": report["text"]["ratio"]}
        assert report["text"]["ours"]["concepts"] == 2
        assert lines[0].startswith("| case | side |")
