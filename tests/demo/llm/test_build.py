"""The pipeline as it is built from the encoder's package: left out where the package is not installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from transformers import AutoModelForCausalLM

from demo.classify import classify, load_classifier
from demo.llm import build
from demo.llm.draw import draw_pictures, draw_pictures_directly, load_pipeline
from demo.llm.encoder import CHAT_TEMPLATE, FILE, EncoderMissing, encode_captions, find_encoder


def test_missing_transformer_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no transformer; restore it from git or run"):
        build.assemble_pipeline(tmp_path)


def test_missing_package_ends_the_command_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object, **__: object) -> None:
        raise EncoderMissing("run `pip install it`")

    monkeypatch.setattr(build, "assemble_pipeline", missing)
    with pytest.raises(SystemExit, match="run `pip install it`"):
        build.main([str(tmp_path)])


def test_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no pipeline; run `python -m demo.llm.build"):
        load_pipeline(tmp_path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZImagePipeline]:
    try:
        find_encoder()
    except EncoderMissing as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("llm")
    build.main([str(folder)])
    yield load_pipeline(folder)
    (folder / "text_encoder" / "model.safetensors").unlink()  # half a gigabyte


@pytest.mark.slow
def test_named_concepts_are_drawn(pipeline: ZImagePipeline) -> None:
    names = ["cat", "rocket", "pizza", "hot dog", "guitar", "castle"]
    pictures = draw_pictures(pipeline, [f"a photo of a {name}" for name in names], range(len(names)))
    confidences = classify(pictures, load_classifier())
    assert torch.stack([confidences.of_concept(name)[row] for row, name in enumerate(names)]).mean() > 0.8


@pytest.mark.slow
def test_pictures_drawn_directly_are_those_of_the_pipeline(pipeline: ZImagePipeline) -> None:
    prompts, seeds = ["a photo of a cat", "rocket", "a hot dog on the table"], [5, 6, 7]
    expected = draw_pictures(pipeline, prompts, seeds, steps=4)
    assert torch.allclose(draw_pictures_directly(pipeline, prompts, seeds, steps=4, batch=2), expected, atol=1e-2)
    with pytest.raises(ValueError, match="tokens; at most 32"):
        draw_pictures_directly(pipeline, ["a very " * 20 + "big cat"], [0])


@pytest.mark.slow
def test_encoder_is_smollm2_as_its_package_has_it(pipeline: ZImagePipeline) -> None:
    folder = find_encoder()
    original = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).model.state_dict()
    saved = pipeline.text_encoder.state_dict()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], weights) for name, weights in original.items())


@pytest.mark.slow
def test_saved_tokenizer_has_the_template_of_the_training(pipeline: ZImagePipeline) -> None:
    assert pipeline.tokenizer.chat_template == CHAT_TEMPLATE
    expected, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=64)
    found = encode_captions(pipeline.tokenizer, pipeline.text_encoder, ["a cat"])
    assert torch.allclose(
        expected[0], found.states[0, : found.lengths[0]], rtol=1e-4, atol=1e-2
    )  # the first token's state is in the thousands
