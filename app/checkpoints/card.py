"""`README.md`: the model card, which names every edited concept. A function of the checkpoint's inputs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.checkpoints.manifest import Inputs, ManifestEdit
from emender.schemas.text import escape_markdown as cell

LIMITS = """\
## Limits

- Only {changed} changed. What a prompt does not reach through the words above is drawn as before, and other
  names of an edited concept may still reach what it used to be.
- Concepts near an edited one, in words or in meaning, may have moved a little.
- This is no safety filter: it does not stop prompts that ask for unsafe pictures (NSFW), and an erased concept may be
  brought back by other prompts, by further training or by other weights. Keep the filters that you have.
{of_cross_attention}"""
REST = "The rest of the pipeline is the base model's, byte for byte.\n"
OF_CROSS_ATTENTION = """\
- Edits of cross-attention cost other concepts more than edits of the text encoder do, and more with each edit.
"""
LORA = """\
`adapters/lora.safetensors` holds the same update as a low-rank adapter for the base model:
load one or the other, not both.
"""
LORA_OF_TEXT_ENCODER = """\
`adapters/lora.safetensors` holds the update of the text encoder alone as a low-rank adapter for the base model: load
one or the other, not both. No adapter holds what changed in the U-Net: take `unet/` from here.
"""
CHECK = """\
## Check it

`manifest.json` lists every input, and every file of this revision with its sha256. If there is a `model.sig`, it signs
every file in the OpenSSF Model Signing format. `emender verify FOLDER --key PUBLIC.pem` or, without Emender,
`model_signing verify key FOLDER --signature FOLDER/model.sig --public_key PUBLIC.pem` finds any change.

## How it was measured

That is kept beside it, since it may be measured again. These calls answer which versions have these weights, each with
links to its evaluations:

{calls}
"""
UNDO = """\
## Undo it

- One edit: `POST /v1/models/{model}/apply` with `{{"from": "VERSION", "remove": ["EDIT"], "alias": "production"}}`
  publishes a version that never had it. EDIT is in the table above, and the calls above answer this one's VERSION.
- All of it: `PUT /v1/models/{model}/aliases/production` with `{{"version": "VERSION"}}` of an earlier version, and
  the header `If-Match` with the ETag of a GET; where it was pulled, `pull.py --rollback` goes back at once.
- Without this service: load the base model; its files are in `manifest.json` with their sha256.

"""
NO_LORA = """\
`unet/` takes the place of the base model's; no adapter holds this change.
"""


def card(inputs: Inputs, *, edited: Mapping[str, str]) -> bytes:
    """The card as Markdown with the Hub's front matter; `edited` maps the paths of the edited components' files to
    their sha256."""
    in_text_encoder, in_cross_attention = inputs.edits_by("text_encoder"), inputs.edits_by("cross_attention")
    count = f"{len(inputs.edits)} concept{'s' if len(inputs.edits) != 1 else ''}"
    encoders = "text encoder" if len(inputs.layers) == 1 else "text encoders"
    model = cell(inputs.model)
    what, made, changed = [], [], []
    if in_text_encoder:
        what.append(
            f"The {encoders} of {model} with these corrections written into its fc2 weights in closed form (EMCID)"
        )
        made.append(_made("", _settings(inputs), inputs.options.get("preserve")))
        made.append(f"- second moments: `{inputs.statistics}`\n")
        changed.append(f"the {encoders}")
    if in_cross_attention:
        settings = inputs.options["cross_attention"]
        own = {name: settings[name] for name in ("erase_scale", "preserve_scale", "regularization_weight")}
        what.append(
            f"The U-Net of {model} was changed: these corrections are written into the keys and values of its "
            "cross-attention in closed form (UCE)"
        )
        made.append(_made("cross-attention: ", own, settings["preserve"]))
        changed.append("the U-Net")
    tables = [_table(edits) for edits in (in_text_encoder, in_cross_attention) if edits]
    intro = "\n".join(
        f"{said}.\n{REST if said == what[-1] else ''}\n{rows}" for said, rows in zip(what, tables, strict=True)
    )
    use = NO_LORA if not in_text_encoder else LORA_OF_TEXT_ENCODER if in_cross_attention else LORA
    limits = LIMITS.format(
        changed=f"{' and '.join(changed)} {'was' if changed in (['the text encoder'], ['the U-Net']) else 'were'}",
        of_cross_attention=OF_CROSS_ATTENTION if in_cross_attention else "",
    )
    weights = [sha256 for path, sha256 in sorted(edited.items()) if path.endswith(".safetensors")]
    check = CHECK.format(calls="".join(f"    GET /v1/files/{sha256}\n" for sha256 in weights))
    text = f"""\
---
library_name: diffusers
pipeline_tag: text-to-image
{_base_model(inputs.model_source)}{_license(inputs.model_license)}tags:
- text-to-image
- concept-editing
- emender
---

# {model}, {count} corrected

{intro}
## How it was made

- base model: {cell(inputs.model_source)}, digest `{inputs.model_digest}`
{"".join(made)}- engine version {inputs.engine}; `manifest.json` has every input with its digest

## Use

{use}
{check}
{UNDO.format(model=inputs.model)}{limits}"""
    return text.encode()


def _table(edits: Sequence[ManifestEdit]) -> str:
    rows = "".join(
        f"| {cell(edit.source)} | {_destination(edit.destination)} | {cell(edit.reason or '')} | {edit.id} |\n"
        for edit in edits
    )
    return f"| prompts that say | now draw | because | edit |\n|---|---|---|---|\n{rows}"


def _made(method: str, settings: Mapping[str, object], preserved: Sequence[str] | None) -> str:
    line = f"- {method}{', '.join(f'{name} {value}' for name, value in settings.items())}\n"
    kept = f"- {method}prompts whose meaning was pinned: {', '.join(map(cell, preserved))}\n" if preserved else ""
    return line + kept


def _settings(inputs: Inputs) -> dict[str, object]:
    spans = [_span(layers) for layers in inputs.layers.values()]
    options = inputs.options
    return {
        "layers": " and ".join(spans),
        "α": inputs.alpha,
        "λ": options.get("moment_weight"),
        "residual_schedule": options.get("residual_schedule"),
    } | ({"contexts": "many"} if options.get("contexts") == "many" else {})


def _span(layers: Sequence[int]) -> str:
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous and len(layers) > 1 else ", ".join(map(str, layers))


def _destination(destination: Mapping[str, Any]) -> str:
    if prompt := destination.get("prompt"):
        return cell(prompt)
    if images := destination.get("images"):
        return f"what {len(images)} reference image{'s show' if len(images) != 1 else ' shows'}"
    if balance := destination.get("balance"):
        return ", ".join(f"{cell(prompt)} ({weight})" for prompt, weight in balance.items())
    neutral = destination.get("neutral")
    return f"nothing of it: erased to {cell(neutral)}" if neutral else "nothing of it: erased"


def _base_model(source: str) -> str:
    """The Hub's link to the base model, where the source is a Hub id."""
    return f"base_model: {json.dumps(source)}\n" if source.count("/") == 1 else ""


def _license(license: Mapping[str, str] | None) -> str:
    """The base model's, under which its parts stand here too."""
    fields = {"license": "id", "license_name": "name", "license_link": "link"}
    given = {field: license[key] for field, key in fields.items() if key in license} if license else {}
    return "".join(f"{field}: {json.dumps(value)}\n" for field, value in given.items())
