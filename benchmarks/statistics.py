"""Second moments against a plain implementation of the published one: CPU time, peak memory, and whether both agree.

    python -m benchmarks.statistics --captions 1000 --json statistics.json

A text encoder of CLIP-L's size with random weights, and captions of the emoji model. Each measurement is a process of
its own, so that CPU time (user + system) and peak memory are its own. The plain one makes a pass over the captions for
each layer, in batches as they come, every caption padded to the full length, and adds in float32; it stops a pass at
the layer that it is for.

The last line on stdout is JSON: `ratio` is plain over ours in CPU time. The exit status is 1 where the two differ by
more than the tolerance.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measuring import POSITIONS, child, difference, measured, read_encoder, write_encoder
from demo.captions import caption_set
from demo.concepts import read_concepts
from editing.encoders.base import TextEncoder
from editing.second_moments.estimate import estimate_second_moments

BATCH = 64
TOLERANCE = 1e-4  # ‖C - C plain‖ / ‖C plain‖ of any layer: the plain one adds in float32


def ours(encoder: TextEncoder, captions: Sequence[str]) -> dict[int, Tensor]:
    return dict(estimate_second_moments(encoder, captions, batch_size=BATCH).moments)


class Reached(Exception):
    """The forward pass has come to the layer that it was made for."""


@torch.no_grad()
def plain(encoder: TextEncoder, captions: Sequence[str]) -> dict[int, Tensor]:
    return {layer: plain_layer(encoder, captions, layer) for layer in encoder.default_edited_layers}


def plain_layer(encoder: TextEncoder, captions: Sequence[str], layer: int) -> Tensor:
    """E[k kᵀ] of one layer, (m, m), by the model's own forward pass."""
    total = torch.zeros(encoder.mlp_width, encoder.mlp_width)
    tokens = 0
    seen: list[Tensor] = []

    def stop(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise Reached

    hook = encoder.output_matrix(layer).register_forward_pre_hook(stop)
    for start in range(0, len(captions), BATCH):
        prompts = [encoder.tokenizer.encode(caption).ids for caption in captions[start : start + BATCH]]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        attended = torch.arange(POSITIONS) < lengths[:, None]  # (b, s)
        try:
            encoder.model(input_ids=encoder.pad(prompts).ids)
        except Reached:
            keys = seen.pop()[attended]  # (tokens, m)
        total += keys.T @ keys
        tokens += len(keys)
    hook.remove()
    return total / tokens


def measure(side: str, folder: Path) -> dict[str, float]:
    """In a process of its own: one run, its CPU seconds and its peak memory over the loaded model."""
    encoder = read_encoder(folder)
    captions = (folder / "captions.txt").read_text().splitlines()
    moments, cost = measured(lambda: ours(encoder, captions) if side == "ours" else plain(encoder, captions))
    save_file({str(layer): moment.float() for layer, moment in moments.items()}, folder / side)
    return cost


def run_child(side: str, folder: Path) -> dict[str, Any]:
    return dict(child("benchmarks.statistics", side, "--folder", str(folder)))


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    write_encoder(folder, width=arguments.width, mlp_width=arguments.mlp_width, layers=arguments.layers)
    captions = caption_set(read_concepts(), count=arguments.captions)
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    tokenizer = read_encoder(folder).tokenizer
    tokens = sum(len(tokenizer.encode(caption).ids) for caption in captions)
    mine, other = run_child("ours", folder), run_child("plain", folder)
    return {
        "benchmark": "statistics",
        "captions": len(captions),
        "tokens": tokens,
        "layers": arguments.layers - 1,
        "ours": mine,
        "plain": other,
        "difference": difference(folder),
        "ratio": other["cpu_seconds"] / mine["cpu_seconds"],
    }


def table(result: dict[str, Any]) -> Table:
    title = f"Second moments of {result['layers']} layers over {result['captions']} captions, {result['tokens']} tokens"
    table = Table("implementation", title=title)
    for column in ("CPU s", "wall s", "CPU ms a caption", "peak MiB over the model", "ratio", "difference"):
        table.add_column(column, justify="right")
    for name in ("plain", "ours"):
        run = result[name]
        table.add_row(
            name,
            f"{run['cpu_seconds']:.1f}",
            f"{run['wall_seconds']:.1f}",
            f"{1000 * run['cpu_seconds'] / result['captions']:.1f}",
            f"{run['peak_bytes_over_model'] / 2**20:.0f}",
            f"{result['ratio']:.1f}" if name == "ours" else "",
            f"{result['difference']:.1e}" if name == "ours" else "",
        )
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--mlp-width", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--child", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.captions < 1:
        parser.error("--captions must be 1 or more")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.child:
        print(json.dumps(measure(chosen.child, chosen.folder)))  # noqa: T201
        return 0
    with tempfile.TemporaryDirectory(prefix="statistics-") as folder:
        result = compare(chosen, Path(folder))
    Console(width=130).print(table(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))  # noqa: T201
    return 0 if result["difference"] <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
