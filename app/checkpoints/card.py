"""`README.md`: the model card, which names every edited concept. A function of the checkpoint's inputs."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.checkpoints.manifest import Inputs

LIMITS = """\
## Limits

- Only the text encoder was changed. What a prompt does not reach through the words above is drawn as before, and other
  names of an edited concept may still reach what it used to be.
- Concepts near an edited one, in words or in meaning, may have moved a little.
- This is no safety filter: it does not stop prompts that ask for unsafe pictures (NSFW), and an erased concept may be
  brought back by other prompts, by further training or by other weights. Keep the filters that you have.
"""


def card(inputs: Inputs) -> bytes:
    """The card as Markdown with the Hub's front matter."""
    rows = "\n".join(f"| {_cell(edit.source)} | {_destination(edit.destination)} |" for edit in inputs.edits)
    count = f"{len(inputs.edits)} concept{'s' if len(inputs.edits) != 1 else ''}"
    settings = ", ".join(f"{name} {value}" for name, value in _settings(inputs).items())
    preserved = inputs.options.get("preserve") or []
    encoders = "text encoder" if len(inputs.layers) == 1 else "text encoders"
    kept = f"- prompts whose meaning was pinned: {', '.join(map(_cell, preserved))}\n" if preserved else ""
    text = f"""\
---
library_name: diffusers
pipeline_tag: text-to-image
{_base_model(inputs.model_source)}tags:
- text-to-image
- concept-editing
- emender
---

# {_cell(inputs.model)}, {count} corrected

The {encoders} of {_cell(inputs.model)} with these corrections written into its fc2 weights in closed form (EMCID).
The rest of the pipeline is the base model's, byte for byte.

| prompts that say | now draw |
|---|---|
{rows}

## How it was made

- base model: {_cell(inputs.model_source)}, digest `{inputs.model_digest}`
- {settings}
{kept}- second moments: `{inputs.statistics}`
- engine version {inputs.engine}; `manifest.json` has every input with its digest

## Use

`adapters/lora.safetensors` holds the same update as a low-rank adapter for the base model:
load one or the other, not both.

{LIMITS}"""
    return text.encode()


def _settings(inputs: Inputs) -> dict[str, object]:
    spans = [_span(layers) for layers in inputs.layers.values()]
    options = inputs.options
    return {
        "layers": " and ".join(spans),
        "α": inputs.alpha,
        "λ": options.get("mass"),
        "residual": options.get("residual"),
    }


def _span(layers: Sequence[int]) -> str:
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous and len(layers) > 1 else ", ".join(map(str, layers))


def _destination(destination: Mapping[str, Any]) -> str:
    if prompt := destination.get("prompt"):
        return _cell(prompt)
    if images := destination.get("images"):
        return f"what {len(images)} reference image{'s show' if len(images) != 1 else ' shows'}"
    if balance := destination.get("balance"):
        return ", ".join(f"{_cell(prompt)} ({weight})" for prompt, weight in balance.items())
    neutral = destination.get("neutral")
    return f"nothing of it: erased to {_cell(neutral)}" if neutral else "nothing of it: erased"


def _base_model(source: str) -> str:
    """The Hub's link to the base model, where the source is a Hub id."""
    return f"base_model: {json.dumps(source)}\n" if source.count("/") == 1 else ""


def _cell(text: str) -> str:
    """A client's words as plain text in Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]()<>#|~&])", r"\\\1", " ".join(text.split()))
