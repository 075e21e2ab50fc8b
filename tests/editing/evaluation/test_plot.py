"""The plot of quality against the number of edits."""

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from editing.evaluation.__main__ import main
from editing.evaluation.iceb import Scores
from editing.evaluation.plot import plot_methods, plot_scales


def scores(s2d: float | None, hd: float) -> Scores:
    return Scores(sf_template=None, sf=None, s2d_template=None, s2d=s2d, al2d=None, hd=hd)


def test_equal_scores_give_equal_bytes() -> None:
    scales = {1: scores(0.9, 0.0), 10: scores(0.8, -0.1)}
    first = plot_scales(scales, title="v1")
    assert first == plot_scales(dict(reversed(scales.items())), title="v1")
    assert first != plot_scales({**scales, 10: scores(0.2, -0.1)}, title="v1")
    picture = numpy.asarray(Image.open(io.BytesIO(first)).convert("RGB"))
    assert picture.shape == (480, 768, 3)
    assert len(numpy.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_undefined_score_has_no_point() -> None:
    assert plot_scales({1: scores(None, 0.0)}, title="v1").startswith(b"\x89PNG")


def report(edits: int, **hd: float | None) -> dict[str, Any]:
    def score(mean: float | None) -> dict[str, float] | None:
        return None if mean is None else {"mean": mean, "ci95": 0.01}

    return {"edits": edits, "methods": {method: {"s2d": score(0.9), "hd": score(mean)} for method, mean in hd.items()}}


def test_methods_are_plotted_together() -> None:
    reports = [report(1, base=0.0, uce=-0.1, emender=0.0), report(30, base=0.0, uce=-0.9, emender=-0.01)]
    first = plot_methods(reports)
    assert first == plot_methods(reports[::-1])
    assert first != plot_methods([reports[0], report(30, base=0.0, uce=-0.5, emender=-0.01)])
    assert first != plot_methods(reports, methods=["uce"])
    assert first == plot_methods([report(1, base=0.5, uce=-0.1, emender=0.0), reports[1]]), "the base is not drawn"
    assert numpy.asarray(Image.open(io.BytesIO(first))).shape[:2] == (504, 1152)


def test_missing_measurement_has_no_point() -> None:
    assert plot_methods([report(1, uce=-0.1), report(30, emender=None)]).startswith(b"\x89PNG")


def test_plot_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "1.json", tmp_path / "30.json"]
    reports = [report(1, uce=-0.1), report(30, uce=-0.9)]
    for file, content in zip(files, reports, strict=True):
        file.write_text(json.dumps(content))
    main(["plot", *map(str, files), "--out", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes() == plot_methods(reports)
    files[0].write_text("[]")
    with pytest.raises(SystemExit) as ended:
        main(["plot", *map(str, files), "--out", str(tmp_path / "other.png")])
    assert ended.value.code == 1 and "1.json is no report" in capsys.readouterr().err
    assert not (tmp_path / "other.png").exists()
