"""The example of `docs/how-to/library.md`, run on a random pipeline and on the emoji model."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from editing.second_moments.moments import SecondMoments

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "library.md"


def read_example() -> str:
    """Return the Python block that loads a pipeline."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "load_pipeline" in block]
    return block


def run_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "out").mkdir()
    exec(compile(read_example(), str(PAGE), "exec"), {})
    with Image.open(folder / "out" / "river-horse.png") as picture:
        assert picture.mode == "RGB"
    assert {path.name for path in (folder / "out" / "edited" / "text_encoder").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_example_is_short() -> None:
    assert len([line for line in read_example().splitlines() if line.strip()]) <= 14


def test_example_runs_on_a_random_pipeline(
    folder: Path, second_moments: SecondMoments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "demo" / "weights"
    weights.mkdir(parents=True)
    shutil.copytree(folder, weights / "pipeline")
    second_moments.save(weights / "pipeline" / "second_moments.safetensors")
    run_example(tmp_path, monkeypatch)


@pytest.mark.slow
def test_example_draws_the_destination_with_the_emoji_model(
    emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo.classify import classify

    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "weights").symlink_to(emoji_folder)
    run_example(tmp_path, monkeypatch)
    with Image.open(tmp_path / "out" / "river-horse.png") as picture:
        seen = classify([picture])
    assert seen.classes.concepts[int(seen.concept.argmax())] == "hippopotamus"
