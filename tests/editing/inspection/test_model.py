"""A model is opened before it is registered: broken ones are refused, each with its own sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import editing
from editing.encoders.clip import ClipEncoder
from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.inspection import weights
from editing.inspection.model import inspect_model
from editing.pipelines import load_pipeline
from editing.prompts import PromptTokenizer
from tests import broken_models
from tests.broken_models import BROKEN, UNUSUAL
from tests.editing.test_tokenizer_files import write_sentencepiece
from tests.families import TEXTS
from tests.generators import write_whole_pipeline
from tests.pipelines import LENGTH, Family


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "pipeline")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_model_is_refused_with_its_own_sentence(copied: Path, kind: str) -> None:
    make, sentence = BROKEN[kind]
    make(copied)
    with pytest.raises((UnsafePipeline, UnsupportedPipeline), match=sentence):
        inspect_model(copied)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_model_encodes_a_prompt_as_the_plain_one(copied: Path, folder: Path, kind: str) -> None:
    UNUSUAL[kind](copied)
    assert inspect_model(copied).family == "sd1"
    ours, plain = (load_pipeline(each).encode(["a photo"]).states for each in (copied, folder))
    torch.testing.assert_close(ours, plain, rtol=0, atol=0.02 if kind == "half precision only" else 0)


def test_any_layout_of_stable_diffusion_passes(any_folder: Path) -> None:
    assert inspect_model(any_folder) == editing.describe_pipeline(any_folder)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in TEXTS])
def test_every_family_passes(name: str, tmp_path: Path) -> None:
    folder = write_whole_pipeline(tmp_path / name, name, shard_size="30kB")
    assert inspect_model(folder).family == name.partition("-")[0]


@pytest.mark.slow
def test_sentencepiece_model_alone_passes(tmp_path: Path) -> None:
    """PixArt and Chroma have no other file of their tokenizer."""
    folder = write_whole_pipeline(tmp_path / "chroma", "chroma")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -6.0) for letter in "abcdefgh")]
    write_sentencepiece(folder / "tokenizer" / "spiece.model", pieces)
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    added = {f"<extra_id_{number}>": len(pieces) + 99 - number for number in range(100)}
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(added))
    assert inspect_model(folder).family == "chroma"


def test_length_comes_from_the_positions_of_the_encoder(copied: Path) -> None:
    broken_models.drop_length(copied)
    assert PromptTokenizer.from_folder(copied / "tokenizer").max_length == LENGTH


def test_added_token_of_older_transformers_is_one_token(copied: Path) -> None:
    broken_models.add_token(copied)
    tokenizer = PromptTokenizer.from_folder(copied / "tokenizer")
    assert len(tokenizer.encode("<my-cat>").ids) == 3


def test_encoder_that_differs_each_time_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipEncoder, "normalize", lambda self, states: self.final_norm(states) + torch.rand(1))
    with pytest.raises(UnsupportedPipeline, match="text_encoder/ encodes .* differently each time"):
        inspect_model(copied)


def test_values_of_large_models_are_sampled(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    frombuffer = torch.frombuffer

    def record(content: bytearray, **options: Any) -> torch.Tensor:
        read.append(len(content))
        return frombuffer(content, **options)

    monkeypatch.setattr(weights, "SAMPLED_BYTES", 1000)
    monkeypatch.setattr(weights, "_CHUNK", 64)
    monkeypatch.setattr(torch, "frombuffer", record)
    tensors = weights.read_tensors(copied / broken_models.UNET)
    weights.check_values(list(tensors.items()))
    assert sum(read) <= 1000 + 64 * len(tensors)
    assert len(read) >= len(tensors)


def test_export_keeps_the_name_of_a_variant_and_writes_no_mark(
    copied: Path, tmp_path: Path, update: editing.Update
) -> None:
    broken_models.keep_half_precision(copied)
    broken_models.add_marks(copied)
    written = editing.export_text_encoder(load_pipeline(copied).encoder, update, tmp_path / "edited")
    assert [path.name for path in written] == ["config.json", "model.fp16.safetensors"]
    assert written[0].read_bytes().startswith(b"{")


def test_random_weights_are_never_loaded(folder_of: Callable[[Family, bool], Path], tmp_path: Path) -> None:
    """Not by the library alone, either."""
    copied = shutil.copytree(folder_of("sd1", False), tmp_path / "pipeline")
    broken_models.drop_tensor(broken_models.UNET)(copied)
    with pytest.raises(UnsupportedPipeline, match="unet/ lacks 1 weights of its UNet2DConditionModel: conv_in.bias"):
        load_pipeline(copied)
