"""A tiny CLIP model with random weights, in the layout of a download, and pictures to show it."""

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from editing.evaluation.metrics import Clip
from tests.pipelines import LENGTH, write_tokenizer

SIDE = 16
SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    vocabulary = write_tokenizer(folder)
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    config = CLIPConfig(
        text_config={**narrow, **ids, "vocab_size": vocabulary, "max_position_embeddings": LENGTH},
        vision_config={**narrow, "image_size": SIDE, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(37)  # with nearness on both sides of 0, and both preferences
        CLIPModel(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> Clip:
    return Clip.from_folder(clip_folder)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Noise of different colours, as large as the model's."""
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
