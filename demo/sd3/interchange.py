"""Measure where the text encoders keep a concept: `python -m demo.sd3.interchange` prints the figures as JSON.

The state of another concept at the subject's last token, after a block of every encoder, is put into the prompt of a
concept. If the picture then shows the other concept, an edit at that block can do so too. If it still shows the first,
other tokens have read the subject before, and no edit at that block can work.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from demo.classify import classify, load_classifier
from demo.sd3.draw import FOLDER, GUIDANCE, STEPS, load_pipeline
from demo.sd3.edit import draw_task
from demo.sd3.pipeline import ENCODERS, T5_LENGTH

TEMPLATE = "a photo of a {}"


@contextmanager
def exchanged(block: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the second half of a batch have the first half's states at the positions (n,), after the block."""

    def exchange(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        count = len(positions)
        rows = torch.arange(count)
        states[count + rows, positions] = states[rows, positions]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = block.register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


def find_blocks(pipeline: StableDiffusion3Pipeline) -> list[tuple[Any, Any]]:
    """Return the blocks of each encoder with its tokenizer."""
    encoders = [getattr(pipeline, name) for name in ENCODERS]
    blocks = [encoders[0].text_model.encoder.layers, encoders[1].text_model.encoder.layers, encoders[2].encoder.block]
    return list(zip(blocks, (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3), strict=True))


def encode(
    pipeline: StableDiffusion3Pipeline, sources: Sequence[str], others: Sequence[str], *, layer: int
) -> tuple[Tensor, Tensor]:
    """Return the condition of the sources with the others' states after block `layer` at the subject's last token."""
    prompts = [TEMPLATE.format(name) for name in (*others, *sources)]
    with ExitStack() as stack:
        for blocks, tokenizer in find_blocks(pipeline):
            ends = torch.tensor([len(ids) - 2 for ids in tokenizer(prompts).input_ids])
            own, other = ends[len(others) :], ends[: len(others)]
            if not torch.equal(own, other):
                raise ValueError("every name must have as many tokens as the other of its pair")
            stack.enter_context(exchanged(blocks[layer], own))
        states, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
    return states[len(others) :], pooled[len(others) :]


@torch.no_grad()
def measure(pipeline: StableDiffusion3Pipeline, *, layer: int, pairs: int, seed: int) -> dict[str, float]:
    """Return the mean confidences in the other concept and in the source."""
    task, classifier = draw_task(edits=pairs, seed=seed), load_classifier()
    states, pooled = encode(pipeline, task.sources, task.destinations, layer=layer)
    empty, _, empty_pooled, _ = pipeline.encode_prompt(
        [""] * pairs, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    pictures = pipeline(
        prompt_embeds=states, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
        negative_pooled_prompt_embeds=empty_pooled, height=32, width=32, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, generator=[torch.Generator().manual_seed(row) for row in range(pairs)],
        output_type="pt",
    ).images  # fmt: skip
    confidences = classify(2 * pictures - 1, classifier).concept
    columns = {"other": task.destinations, "source": task.sources}
    return {
        key: confidences[range(pairs), [classifier.names.index(name) for name in names]].mean().item()
        for key, names in columns.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.sd3.interchange", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="the pipeline (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 4], help="default: 0 1 2 4")
    parser.add_argument("--pairs", type=int, default=20, help="of concepts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100, help="of their choice (default: %(default)s)")
    given = parser.parse_args(arguments)
    pipeline = load_pipeline(given.folder)
    report = {layer: measure(pipeline, layer=layer, pairs=given.pairs, seed=given.seed) for layer in given.layers}
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
