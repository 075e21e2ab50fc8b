"""The plot of quality against the number of edits."""

import io

import numpy
from PIL import Image

from editing.evaluation.iceb import Scores
from editing.evaluation.plot import plot_scales


def scores(s2d: float | None, hd: float) -> Scores:
    return Scores(sf_template=None, sf=None, s2d_template=None, s2d=s2d, al2d=None, hd=hd)


def test_same_scores_same_bytes_and_others_other() -> None:
    scales = {1: scores(0.9, 0.0), 10: scores(0.8, -0.1)}
    first = plot_scales(scales, title="v1")
    assert first == plot_scales(dict(reversed(scales.items())), title="v1")
    assert first != plot_scales({**scales, 10: scores(0.2, -0.1)}, title="v1")
    picture = numpy.asarray(Image.open(io.BytesIO(first)).convert("RGB"))
    assert picture.shape == (480, 768, 3)
    assert len(numpy.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_draws_what_is_not_defined_as_nothing() -> None:
    assert plot_scales({1: scores(None, 0.0)}, title="v1").startswith(b"\x89PNG")
