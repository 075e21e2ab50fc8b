from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from demo.sd3.pipeline import Networks, Shape, save_pipeline
from demo.sd3.tokenizer import build_t5_tokenizer, load_clip_tokenizer

SHAPE = Shape(clip=(32, 2), clip_2=(32, 3), t5=(128, 4), t5_mlp=64, transformer=(64, 2))


@pytest.fixture
def clip_tokenizer() -> CLIPTokenizer:
    return load_clip_tokenizer()


@pytest.fixture
def t5_tokenizer() -> T5TokenizerFast:
    return build_t5_tokenizer(["a photo of a fox", "a big red fox!", "a dog"])


@pytest.fixture
def networks(clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast) -> Networks:
    """Small networks of random weights, none at its initial value."""
    torch.manual_seed(0)
    built = Networks(clip_tokenizer, t5_tokenizer, SHAPE)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.eval()


@pytest.fixture
def pipeline_folder(
    networks: Networks, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, tmp_path: Path
) -> Path:
    folder = tmp_path / "sd3"
    save_pipeline(networks, clip_tokenizer, t5_tokenizer, folder)
    return folder
