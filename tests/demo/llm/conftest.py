import pytest
import torch
from diffusers import ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from demo.llm.encoder import CHAT_TEMPLATE
from demo.llm.transformer import build_transformer

WIDTH = 16


@pytest.fixture
def transformer() -> ZImageTransformer2DModel:
    """Two layers of random weights, none of them zero."""
    torch.manual_seed(0)
    model = build_transformer(caption_width=WIDTH, width=64, heads=2, layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def encoder() -> LlamaModel:
    """Three layers of random weights, 16 wide."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaModel(shape).eval().requires_grad_(False)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and SmolLM2's marks of turns."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = {"<|im_end|>": 0, "<|im_start|>": 1} | {
        byte: index + 2 for index, byte in enumerate(sorted(alphabet)[:250])
    }
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    made.chat_template = CHAT_TEMPLATE
    return made
