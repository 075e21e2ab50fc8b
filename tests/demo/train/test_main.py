from collections.abc import Callable
from pathlib import Path

import pytest

from demo.train import __main__ as command
from demo.train import unet


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "3"], "name the stage"),
        (["unet", "--warm-start", "nowhere"], "nowhere is not a diffusers pipeline folder"),
        (["violin"], "invalid choice"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert complaint in capsys.readouterr().err


def test_stages_run_in_the_order_named_with_their_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, int | None, int]] = []

    def noted(name: str) -> Callable[[command.Options], None]:
        return lambda options: ran.append((name, options.steps, options.schedule(unet.SCHEDULE).steps))

    (tmp_path / "art.safetensors").touch()
    monkeypatch.setattr(command, "STAGES", {name: noted(name) for name in command.STAGES})
    command.main(["unet", "classifier", "--steps", "7", "--work", str(tmp_path)])
    assert ran == [("unet", 7, 7), ("classifier", 7, 7)]
    ran.clear()
    command.main(["--work", str(tmp_path)])
    assert [name for name, *_ in ran] == ["tokenizer", "autoencoder", "text-encoder", "unet", "classifier", "export"]
    assert ran[0][1:] == (None, unet.SCHEDULE.steps)
