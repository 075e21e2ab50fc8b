"""A stage that was stopped and resumed ends where an uninterrupted one ends."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from demo.train.loop import Schedule, Training, trained

SCHEDULE = Schedule(steps=6, batch=4, rate=0.1, warmup=2, checkpoint_every=3, sample_every=2)


def start(folder: Path, schedule: Schedule = SCHEDULE) -> tuple[Training, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return Training(folder, "line", {"model": model}, schedule), model


def run(training: Training, model: nn.Linear, *, stop_after: int | None = None, shown: list[int] | None = None) -> None:
    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        if stop_after is not None and training.step == stop_after:
            raise KeyboardInterrupt
        rows = torch.randn(training.schedule.batch, 3, generator=generator)
        return {"loss": (model(rows) - rows.sum(1, keepdim=True)).square().mean()}

    training.run(loss, sample=None if shown is None else shown.append)


def test_interrupted_equals_uninterrupted(tmp_path: Path) -> None:
    whole, model = start(tmp_path / "whole")
    run(whole, model)

    halted, first = start(tmp_path / "halted")
    with pytest.raises(KeyboardInterrupt):
        run(halted, first, stop_after=5)
    resumed, second = start(tmp_path / "halted")
    assert resumed.resume() and resumed.step == 3
    run(resumed, second)

    assert torch.equal(model.weight, second.weight) and torch.equal(model.bias, second.bias)
    assert torch.equal(trained(tmp_path / "halted", "line", "model")["weight"], model.weight)


def test_checkpoints_are_safetensors_and_json_only(tmp_path: Path) -> None:
    training, model = start(tmp_path)
    run(training, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line-6.safetensors", "line-state.json"]
    assert json.loads((tmp_path / "line-state.json").read_text())["step"] == 6
    assert training.finished


def test_nothing_to_resume(tmp_path: Path) -> None:
    training, _ = start(tmp_path)
    assert not training.resume()
    with pytest.raises(FileNotFoundError, match="python -m demo.train line"):
        trained(tmp_path, "line", "model")


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    training, model = start(tmp_path)
    run(training, model)
    other = Training(tmp_path, "line", {"model": nn.Linear(4, 1)}, SCHEDULE)
    with pytest.raises(ValueError, match="does not fit"):
        other.resume()


def test_samples_are_drawn_when_asked_and_at_the_end(tmp_path: Path) -> None:
    shown: list[int] = []
    training, model = start(tmp_path, Schedule(steps=5, batch=4, rate=0.1, warmup=1, sample_every=2))
    run(training, model, shown=shown)
    assert shown == [2, 4, 5]


def test_rate_warms_up_stays_and_falls() -> None:
    schedule = Schedule(steps=100, batch=1, rate=1.0, warmup=10, decay_from=0.5, last_rate=0.1)
    assert schedule.rate_at(0) == pytest.approx(0.1)
    assert schedule.rate_at(30) == 1.0
    assert schedule.rate_at(75) == pytest.approx(0.55)
    assert schedule.rate_at(100) == pytest.approx(0.1)


def test_budget_of_seconds_ends_the_training_and_sets_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(steps=1000, batch=4, rate=1.0, warmup=1, decay_from=0.5, last_rate=0.1, seconds=8.0)
    assert schedule.rate_at(999, 1.0) == 1.0
    assert schedule.rate_at(2, 6.0) == pytest.approx(0.55)
    clock = iter(range(100))
    monkeypatch.setattr("demo.train.loop.time.perf_counter", lambda: float(next(clock)))
    training, model = start(tmp_path, schedule)
    run(training, model)
    assert training.step == 8 and training.finished
    resumed, _ = start(tmp_path, schedule)
    assert resumed.resume() and resumed.finished


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    training, model = start(tmp_path)
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        training.run(lambda _: {"loss": model.weight.sum() * float("nan")})
