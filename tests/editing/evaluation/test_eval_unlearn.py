"""The technique for `eval-unlearn`: by itself, and where that package is installed in its own runner."""

import json
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest

from editing.errors import EditingError, UnsafePipeline, UnsupportedPipeline
from editing.evaluation.eval_unlearn import EmenderTechnique
from tests.editing.conftest import ROOT

SHORT: dict[str, Any] = {"device": "cpu", "num_inference_steps": 2}


def entry_point() -> Any:
    """The technique by the name under which the package offers it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["eval_unlearn.techniques"]["emender"].split(":")
    return getattr(import_module(module), name)


class TestEmenderTechnique:
    def test_each_picture_has_its_own_seed(self, folder: Path) -> None:
        technique = EmenderTechnique(model=str(folder), erase_concept="nudity", **SHORT)
        two = [numpy.asarray(picture) for picture in technique.generate(prompts=["a cat", "a dog"], seed=4)]
        (alone,) = technique.generate(prompts=["a dog"], seed=5)
        assert (two[1] == numpy.asarray(alone)).all()
        (again,) = technique.generate(prompts=["a cat"], seed=5)
        assert (two[0] != numpy.asarray(again)).any()
        assert two[0].shape == (16, 16, 3)

    def test_settings_go_to_the_pipeline(self, folder: Path) -> None:
        technique = EmenderTechnique(model=str(folder), guidance_scale=1.0, **SHORT)
        plain, guided = (
            numpy.asarray(technique.generate(["a cat"], seed=0, **more)[0]) for more in ({}, {"guidance_scale": 20.0})
        )
        assert (plain != guided).any()

    def test_sdxl_pipeline_is_loaded(self, folder_of: Any) -> None:
        technique = EmenderTechnique(model=str(folder_of("sdxl", False)), **SHORT)
        (picture,) = technique.generate(["a cat"], seed=0)
        assert picture.size == (16, 16)

    def test_pictures_differ_without_a_seed(self, folder: Path) -> None:
        technique = EmenderTechnique(model=str(folder), **SHORT)
        ones, others = (numpy.asarray(technique.generate(["a cat"])[0]) for _ in range(2))
        assert (ones != others).any()

    def test_invalid_settings_are_refused(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedPipeline):
            EmenderTechnique(model=str(tmp_path))
        with pytest.raises(EditingError, match="needs an endpoint"):
            EmenderTechnique(model=str(folder), revision="production")
        unknown: dict[str, Any] = {"steps": 2}
        with pytest.raises(TypeError, match="steps"):
            EmenderTechnique(model=str(folder), **unknown)
        with pytest.raises(UnsupportedPipeline, match="no/model cannot be downloaded from http://127.0.0.1:9"):
            EmenderTechnique(model="no/model", endpoint="http://127.0.0.1:9")

    def test_pickles_are_refused(self, folder: Path, tmp_path: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
        weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(UnsafePipeline, match="unet/"):
            EmenderTechnique(model=str(tmp_path))


@pytest.mark.filterwarnings("default")  # of a package that is not ours
def test_technique_runs_in_eval_unlearn(folder: Path, tmp_path: Path) -> None:
    """A run of eval-unlearn with a metric of the test's own, as those that come with it fetch models."""
    pytest.importorskip(
        "eval_unlearn", reason="eval-unlearn is not installed: pip install 'emender-service[eval-unlearn]'"
    )
    from eval_unlearn.registry import register_metric, register_technique
    from eval_unlearn.runners import SingleBenchmarkRunner
    from eval_unlearn.types import Dataset, MetricResult

    class Brightness:
        def __init__(self) -> None:
            self.levels: list[float] = []

        def load_dataset(self) -> list[Dataset]:
            return [Dataset(prompts=["a cat", "a dog"]), Dataset(prompts=["a fish"])]

        def update(self, images: list[Any], prompts: list[str], metadata: dict[str, Any]) -> None:
            self.levels += [float(numpy.asarray(image).mean()) for image in images]

        def compute(self) -> MetricResult:
            return MetricResult("brightness", sum(self.levels) / len(self.levels), {"levels": self.levels})

    register_technique("emender")(entry_point())
    register_metric("brightness")(Brightness)
    config: dict[str, Any] = {"model": str(folder), "erase_concept": "cat", **SHORT}
    report = SingleBenchmarkRunner("emender", "brightness", config, output_dir=str(tmp_path), seed=3).run()

    technique = EmenderTechnique(**config)
    drawn = technique.generate(["a cat", "a dog"], seed=3) + technique.generate(["a fish"], seed=3)
    levels = [float(numpy.asarray(picture).mean()) for picture in drawn]
    assert report["metric_result"]["details"]["levels"] == levels
    assert (report["technique_name"], report["erase_concept"]) == ("emender", "cat")
    assert len(list(tmp_path.rglob("*.png"))) == 3
    assert json.loads(next(tmp_path.rglob("*_report.json")).read_text())["erase_concept"] == "cat"


def test_entry_point_is_registered() -> None:
    assert entry_point() is EmenderTechnique
