"""Write `README.md`, the model card, which names every edit. Equal inputs give equal bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.checkpoints.files import EDITABLE
from app.checkpoints.manifest import Inputs
from app.checkpoints.markdown import render_markdown
from emender.schemas.text import escape_markdown

GENERATORS = {
    "cross_attention": ("unet", "U-Net", "keys and values of the cross-attention"),
    "text_projection": ("transformer", "transformer", "text projection"),
}
"""The component that a method edits, what it is, and which part of it is edited."""


def write_card(inputs: Inputs, *, files: Mapping[str, str], classes: Mapping[str, str]) -> bytes:
    """Return the card as Markdown with the Hub's front matter.

    `files` maps the paths of the checkpoint's weights and adapters to their sha256, `classes` each component to its
    class.
    """
    text_encoder_edits, uce_edits = inputs.edits_by("text_encoder"), inputs.edits_by(inputs.projection_method)
    encoders = "text encoder" if len(inputs.layers) == 1 else "text encoders"
    component, generator, part = GENERATORS[inputs.projection_method]
    changed = [f"the {encoders}"] if text_encoder_edits else []
    weights = [path for path in sorted(files) if path.startswith(EDITABLE) and path.endswith(".safetensors")]
    names = sorted({path.partition("/")[0] for path in weights})
    text = render_markdown(
        Path(__file__).with_name("card.md.jinja"),
        destination=_destination,
        inputs=inputs,
        options={"contexts": "own", "preserve": [], **inputs.options},
        front_matter=_front_matter(inputs),
        text_encoder_edits=text_encoder_edits,
        uce_edits=uce_edits,
        uce=inputs.options.get(inputs.projection_method),
        encoders=encoders,
        component=component,
        generator=generator,
        part=part,
        changed=[*changed, f"the {generator}"] if uce_edits else changed,
        replaced={name: classes[name] for name in names},
        imports=sorted({("diffusers" if name == component else "transformers", classes[name]) for name in names}),
        adapters=[name for name in names if f"adapters/{name}/adapter_config.json" in files],
        spans=[_span(layers) for layers in inputs.layers.values()],
        weights=[files[path] for path in weights],
    )
    return text.encode()


def _front_matter(inputs: Inputs) -> dict[str, str]:
    """Return the license of the base model, and its Hub id if it is one."""
    fields = {"base_model": inputs.model_source} if inputs.model_source.count("/") == 1 else {}
    names = {"license": "id", "license_name": "name", "license_link": "link"}
    license = inputs.model_license or {}
    return fields | {field: license[name] for field, name in names.items() if name in license}


def _span(layers: Sequence[int]) -> str:
    contiguous = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous and len(layers) > 1 else ", ".join(map(str, layers))


def _destination(destination: Mapping[str, Any]) -> str:
    if prompt := destination.get("prompt"):
        return escape_markdown(prompt)
    if images := destination.get("images"):
        return f"what {len(images)} reference image{'s show' if len(images) != 1 else ' shows'}"
    if balance := destination.get("balance"):
        return ", ".join(f"{escape_markdown(prompt)} ({weight})" for prompt, weight in balance.items())
    neutral = destination.get("neutral")
    return f"erased to {escape_markdown(neutral)}" if neutral else "erased"
