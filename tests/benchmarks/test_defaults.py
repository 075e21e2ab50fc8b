import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import defaults
from benchmarks.defaults import BASE, SETTINGS, TEXT, Bench
from editing.second_moments.moments import SecondMoments


def moments() -> SecondMoments:
    torch.manual_seed(0)
    keys = torch.randn(8, 40, dtype=torch.float64)
    return SecondMoments({0: keys @ keys.T / 40}, captions=40, tokens=40)


def test_a_power_of_the_moments_keeps_their_trace_and_directions() -> None:
    before = moments().moments[0]
    after = defaults._reshaped(moments(), 0.5, None).moments[0]
    assert torch.trace(after).item() == pytest.approx(torch.trace(before).item())
    assert torch.allclose(after @ after / (after @ after).trace(), before / before.trace())


def test_null_space_holds_the_strong_directions_and_frees_the_weak() -> None:
    before = moments().moments[0]
    after = defaults._reshaped(moments(), 1.0, 0.9).moments[0]
    spectrum, basis = torch.linalg.eigh(before)
    weak, strong = basis[:, 0], basis[:, -1]
    assert weak @ after @ weak < spectrum.mean() < strong @ after @ strong


def test_names_of_settings_mean_different_settings() -> None:
    assert len(set(map(repr, SETTINGS.values()))) == len(SETTINGS)


@pytest.mark.long
@pytest.mark.slow
def test_a_table_is_filled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = replace(BASE, stage_one=replace(TEXT, optimization_steps=40))
    monkeypatch.setattr(defaults, "SETTINGS", {"quick": quick, "quick, even": replace(quick, residual_schedule="even")})
    arguments = ["--edits", "2", "--seeds", "0", "1", "--out", str(tmp_path), "--json", str(tmp_path / "all.json")]
    arguments += ["--settings", "quick", "quick, even"]
    defaults.main(arguments)
    first = json.loads((tmp_path / "all.json").read_text())
    assert [(row["setting"], row["edits"], len(row["scores"])) for row in first] == [
        ("quick", 2, 2),
        ("quick, even", 2, 2),
    ]
    assert all(score["s2d_free"] > 0.5 for row in first for score in row["scores"])
    assert first[0]["scores"] != first[1]["scores"]
    assert len(list(tmp_path.glob("values-*"))) == 2  # one set of values a seed serves both settings

    monkeypatch.setattr(Bench, "_update", None)  # nothing is computed again
    defaults.main(arguments)
    assert json.loads((tmp_path / "all.json").read_text()) == first
    assert "quick, even" in capsys.readouterr().out
