"""The example of the page on the library, run as it stands: on a random pipeline, and on the emoji model if there."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from editing.second_moments.moments import SecondMoments

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "library.md"


def example() -> str:
    """The one Python block that loads a pipeline."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "load_pipeline" in block]
    return block


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "out").mkdir()
    exec(compile(example(), str(PAGE), "exec"), {})
    with Image.open(folder / "out" / "river-horse.png") as picture:
        assert picture.mode == "RGB"
    assert {path.name for path in (folder / "out" / "corrected" / "text_encoder").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_is_ten_lines() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 12


def test_runs_on_a_random_pipeline(
    folder: Path, second_moments: SecondMoments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "demo" / "weights"
    weights.mkdir(parents=True)
    shutil.copytree(folder, weights / "pipeline")
    second_moments.save(weights / "pipeline" / "second_moments.safetensors")
    run(tmp_path, monkeypatch)


@pytest.mark.slow
def test_draws_the_destination_on_the_emoji_model(
    emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo.classify import classify

    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "weights").symlink_to(emoji_folder)
    run(tmp_path, monkeypatch)
    with Image.open(tmp_path / "out" / "river-horse.png") as picture:
        seen = classify([picture])
    assert seen.classes.concepts[int(seen.concept.argmax())] == "hippopotamus"
