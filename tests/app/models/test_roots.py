from pathlib import Path

import pytest

from app.models.roots import find_captions, find_folder, find_outside_link

pytestmark = pytest.mark.security


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """Two roots, and a folder beside them with a model."""
    for name in ("one/model", "two/other", "outside/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "outside" / "captions.txt").write_text("a secret")
    return (tmp_path / "one", tmp_path / "two")


def test_direct_subfolders(roots: tuple[Path, Path]) -> None:
    assert find_folder(roots, "model") == roots[0] / "model"
    assert find_folder(roots, "other") == roots[1] / "other"
    for name in ("outside", "..", ".", "", "model/.", "../outside/model", str(roots[0] / "model")):
        assert find_folder(roots, name) is None


def test_a_link_out_of_the_roots_is_nothing(roots: tuple[Path, Path], tmp_path: Path) -> None:
    (roots[0] / "link").symlink_to(tmp_path / "outside" / "model")
    (roots[0] / "loop").symlink_to(roots[0] / "loop")
    (roots[0] / "captions.txt").symlink_to(tmp_path / "outside" / "captions.txt")
    assert find_folder(roots, "link") is None
    assert find_folder(roots, "loop") is None
    assert find_captions(roots, "captions") is None


def test_a_link_between_the_roots_is_followed(roots: tuple[Path, Path]) -> None:
    (roots[0] / "alias").symlink_to(roots[1] / "other")
    (roots[0] / "model" / "shared.json").symlink_to(roots[1] / "other" / "config.json")
    assert find_folder(roots, "alias") == roots[0] / "alias"
    assert find_outside_link(roots, roots[0] / "model") is None


@pytest.mark.parametrize("target", ["outside/captions.txt", "outside/model"])
def test_links_within_a_model_stay_in_the_roots_too(roots: tuple[Path, Path], tmp_path: Path, target: str) -> None:
    (roots[0] / "model" / "deep").mkdir()
    link = roots[0] / "model" / "deep" / "weights.safetensors"
    link.symlink_to(tmp_path / target)
    assert find_outside_link(roots, roots[0] / "model") == link
