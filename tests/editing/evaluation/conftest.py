"""Benchmarks in miniature, with everything that real ones have: random pipelines, CLIP models and classifiers in the
layout of a download, pictures to show them, and files as ICEB's."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from editing.evaluation.metrics import Clip
from editing.second_moments.moments import SecondMoments
from tests.pipelines import write_clip

SIDE = 16
SHARED = Path(__file__).parents[4] / "shared" / "data"
CLASSES = ("cat", "dog", "fish", "bird", "red hat", "old tree")
TEMPLATES = ["An image of {}", "A photo of {}", "{}"]
COLUMNS = ("source", "dest", "prompts", "seed_train", "seeds", "source id", "dest id")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> Clip:
    return Clip.from_folder(clip_folder)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Noise of different colors, as large as the model's."""
    noise = numpy.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=numpy.uint8)
    noise[::2, :, :, 0] = 250
    return [Image.fromarray(picture) for picture in noise]


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A file of the benchmarks as shipped, where the project's shared data is mounted."""

    def find(name: str) -> Path:
        if not (SHARED / name).is_file():
            pytest.skip(f"no ../shared/data/{name} here")
        return SHARED / name

    return find


def write_classifier(folder: Path, *, classes: Sequence[str] = CLASSES) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            id2label=dict(enumerate(classes)),
            initializer_range=1.0,  # so that its opinion of random pictures differs
        )
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def edit(source: str, dest: str, prompts: Any, seeds: Any, *, source_id: int, dest_id: int) -> dict[str, Any]:
    row = (source, dest, prompts, 7, seeds, source_id, dest_id)
    return dict(zip(COLUMNS, row, strict=True))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def iceb_folder(tmp_path: Path) -> Path:
    return write_iceb(tmp_path / "iceb")


def write_iceb(folder: Path) -> Path:
    """Two arbitrary edits, cat to dog and old tree to bird; one rectification, kitty; held out: dog, bird, fish."""
    folder.mkdir()
    free = ["the {} runs", "one Cat."]
    write_rows(
        folder / "arbitrary_train.csv",
        [
            edit("cat", "dog", TEMPLATES, [1, "2", 3], source_id=0, dest_id=1),
            edit("old tree", "bird", TEMPLATES, ["4", "5", "6"], source_id=5, dest_id=3),
        ],
    )
    write_rows(
        folder / "arbitrary_val.csv",
        [
            edit("cat", "dog", free, ["1", 2], source_id=0, dest_id=1),
            edit("old tree", "bird", ["a {}"], [4], source_id=5, dest_id=3),
        ],
    )
    write_rows(folder / "rectification_train.csv", [edit("kitty", "cat", TEMPLATES, [], source_id=0, dest_id=0)])
    write_rows(
        folder / "rectification_val.csv", [edit("kitty", "cat", ["a {}"] * 4, [1, 2, 3, 4], source_id=0, dest_id=0)]
    )
    (folder / "class2id.json").write_text(json.dumps({name: place for place, name in enumerate(CLASSES)}))
    scores = {"cat": 0.9, "kitten": 0.5, "feline": 0.49}
    (folder / "imgnet_prompts_cls.json").write_text(
        json.dumps({"0": {name: {"mean": score, "number": 8} for name, score in scores.items()}})
    )
    entries = [
        {"class name": name, "text prompt": f"{text} {name}", "random seed": seed, "class id": CLASSES.index(name)}
        for name in ("dog", "bird", "fish")
        for text, seed in (("a", 8), ("the", "9"))
    ]
    (folder / "imgnet_aug_test.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="session")
def moments_file(second_moments: SecondMoments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moments") / "second_moments.safetensors"
    second_moments.save(path)
    return path
