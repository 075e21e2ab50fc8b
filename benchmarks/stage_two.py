"""Stage II against a plain implementation of the published one: CPU time, peak memory, and whether both agree.

    python -m benchmarks.stage_two --edits 10 100 --json stage_two.json

A text encoder of CLIP-L's size with random weights, random values, three templates and subjects of two tokens. Each
measurement is a process of its own, so that CPU time (user + system) and peak memory are its own. The factors of the
second moments are on disk before ours is measured; the plain one factors each system, as published.

The last line on stdout is JSON: `ratio` is plain over ours in CPU time, published mode, at the most edits. The exit
status is 1 where the two differ by more than the tolerance.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measuring import (
    POSITIONS,
    TOKENIZER,
    child,
    cpu_seconds,
    difference,
    measured,
    read_encoder,
    say,
    write_encoder,
)
from editing.edits import ConceptEdit, DestinationPrompt
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_two.update import ResidualSchedule, compute_update
from editing.values import EditValue, EncoderValue

ALPHA, MOMENT_WEIGHT = 0.5, 4000.0
TOLERANCE = 1e-4  # ‖ΔW - ΔW plain‖ / ‖ΔW plain‖ of any layer: the plain encoder computes in float32
BATCH = 48  # prompts in one forward pass of the plain implementation


class Workload:
    """The encoder, the edits and their values: the same in every process, from files and seeds."""

    def __init__(self, folder: Path, *, edits: int) -> None:
        self.encoder = read_encoder(folder)
        self.moments = folder / "second_moments.safetensors"
        self.layers = self.encoder.default_edited_layers
        self.edits = [ConceptEdit(subject, DestinationPrompt("art")) for subject in subjects(edits)]
        random = torch.Generator().manual_seed(1)
        drawn = torch.randn(edits, 2, self.encoder.width, generator=random)
        own = [EncoderValue(self.layers[-1], delta, hidden) for delta, hidden in drawn]
        self.values = [EditValue({self.encoder.name: value}) for value in own]


def subjects(count: int) -> list[str]:
    """Distinct pairs of words that are one token each, as the names of artists and objects often are."""
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    words = sorted(word.removesuffix("</w>") for word in vocabulary if word.endswith("</w>"))
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 3]
    pairs = (f"{words[i % len(words)]} {words[(i * 7 + i // len(words)) % len(words)]}" for i in range(10 * count))
    return list(dict.fromkeys(pairs))[:count]


def write_workload(folder: Path, *, width: int, mlp_width: int, layers: int) -> None:
    """Return a random encoder, and second moments of its size whose eigenvalues fall off over three decades."""
    write_encoder(folder, width=width, mlp_width=mlp_width, layers=layers)
    encoder = read_encoder(folder)
    moments = {}
    states = encoder.embed(torch.arange(POSITIONS)[None] + 500)
    for layer in range(layers):
        stream, keys = encoder.attend(layer, states)
        states = stream + encoder.output_matrix(layer)(keys)
        basis = torch.randn(mlp_width, width) * torch.logspace(0, -1.5, width)
        moment = basis @ basis.T
        moment += 1e-3 * moment.trace() / mlp_width * torch.eye(mlp_width)
        moments[layer] = moment * (keys.square().sum(-1).mean() / moment.trace())
    SecondMoments(moments, captions=0, tokens=0).save(folder / "second_moments.safetensors")


def ours(work: Workload, residual_schedule: ResidualSchedule, folder: Path) -> dict[int, Tensor]:
    factored = FactoredMoments(work.moments, folder=folder / "factors", digest="benchmark")
    update = compute_update(
        work.encoder,
        work.edits,
        work.values,
        factored,
        alpha=ALPHA,
        moment_weight=MOMENT_WEIGHT,
        residual_schedule=residual_schedule,
    )
    return {layer: change.to_dense() for layer, change in update.layers.items()}


@torch.no_grad()
def plain(work: Workload, residual_schedule: ResidualSchedule, *, padding: str) -> dict[int, Tensor]:
    """Stage II as published, in float32 and with a float64 solve: per layer one whole forward pass over every prompt
    for the keys, another for the values, and a dense system; the weights are changed in place."""
    tokenizer, layers, q = work.encoder.tokenizer, work.layers, len(work.layers)
    positions = [tokenizer.locate(template, edit.source) for edit in work.edits for template in edit.templates]
    ids = work.encoder.pad([position.ids for position in positions], full_length=padding == "full").ids
    last = torch.tensor([position.last_subject_index for position in positions])
    own = [value.encoders[work.encoder.name] for value in work.values]
    z = torch.stack([value.delta + value.hidden for value in own], 1).double()  # (d, n)

    def forward(module: torch.nn.Module, *, output: bool) -> Tensor:
        """Return what a module reads or returns at the last subject tokens, mean over the templates, (·, n)."""
        rows: list[Tensor] = []
        for batch, at in zip(ids.split(BATCH), last.split(BATCH), strict=True):
            seen: list[Any] = []
            hook = module.register_forward_hook(lambda _, inputs, result: seen.append(result if output else inputs[0]))  # noqa: B023
            work.encoder.model(input_ids=batch)
            hook.remove()
            states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            rows.append(states[torch.arange(len(at)), at])
        return torch.cat(rows).unflatten(0, (len(work.edits), -1)).mean(1).double().T

    changes = {}
    for done, layer in enumerate(layers):
        fc2 = work.encoder.output_matrix(layer)
        keys = forward(fc2, output=False)  # (m, n)
        target = fc2 if residual_schedule == "published" else work.encoder.blocks[layers[-1]].layer
        r = (z - forward(target, output=True)) / (q - done)  # (d, n)
        moment = SecondMoments.load(work.moments, layers=[layer]).moments[layer]
        system = (1 - ALPHA) * MOMENT_WEIGHT * moment + ALPHA * keys @ keys.T  # (m, m)
        changes[layer] = ALPHA * r @ torch.linalg.solve(system, keys).T
        fc2.weight += changes[layer].float()
    return changes


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """In a process of its own: one run, its CPU seconds and its peak memory over the loaded model."""
    work = Workload(folder, edits=arguments.edits[0])
    mode = arguments.modes[0]

    def run() -> dict[int, Tensor]:
        return ours(work, mode, folder) if arguments.child == "ours" else plain(work, mode, padding=arguments.padding)

    changes, cost = measured(run)
    save_file({str(layer): change.contiguous() for layer, change in changes.items()}, folder / arguments.child)
    return cost


def run_child(arguments: argparse.Namespace, folder: Path, side: str, *, edits: int, mode: str) -> dict[str, Any]:
    """Return the median of the repeats; the figures of the last one stand for the rest."""
    given = ["--folder", str(folder), "--edits", str(edits), "--modes", mode, "--padding", arguments.padding]
    runs = [child("benchmarks.stage_two", side, *given) for _ in range(arguments.repeats)]
    return {name: median(run[name] for run in runs) for name in runs[0]}


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP per CPU second of a matrix product of an encoder's shape."""
    a, b = torch.randn(1024, 768, dtype=dtype), torch.randn(768, 3072, dtype=dtype)
    a @ b
    start = cpu_seconds()
    for _ in range(8):
        a @ b
    return 8 * 2 * a.numel() * b.shape[1] / (cpu_seconds() - start)


def count_flop(work: Workload, mode: str, *, padding: str) -> dict[str, dict[str, float]]:
    """FLOP of each part, by implementation and then part, from the shapes; attention's own products are left out."""
    d, m, n, q = work.encoder.width, work.encoder.mlp_width, len(work.edits), len(work.layers)
    positions = [work.encoder.tokenizer.locate(t, edit.source) for edit in work.edits for t in edit.templates]
    nodes = len({position.ids[:end] for position in positions for end in range(1, len(position.prefix) + 1)})
    projections, memory = 8 * d * d, 4 * d * m  # FLOP a token and layer: q, k, v, out; fc1 and fc2
    length = POSITIONS if padding == "full" else max(len(position.ids) for position in positions)
    key = len(positions) * 2 * d * m
    once = q * (nodes * projections + key) + (q - 1) * nodes * memory
    ahead = sum(nodes * (projections + memory) for start in range(q) for _ in range(start + 1, q)) + q * key
    if n < m:
        solve = q * (m * m * (n + min(n, d)) + 2 * m * n * (n + min(n, d)) + n**3 / 3)
    else:
        solve = q * (2 * m * m * n + m**3 / 3 + 2 * m * m * d)
    return {
        "ours": {
            "float64 pass": once,
            "float32 look-ahead": ahead if mode == "spread" else 0.0,
            "float64 solve": solve,
        },
        "plain": {
            "float32 passes": 2.0 * q * len(positions) * length * work.encoder.n_layers * (projections + memory),
            "float64 solve": q * (2 * m * m * n + 2 / 3 * m**3 + 2 * m * m * n + 2 * d * m * n),
        },
    }


def share_of_peak(parts: dict[str, float], peaks: dict[str, float], seconds: float) -> float:
    """Return the CPU time that the products alone would take at the measured peak, over the CPU time taken."""
    return sum(flop / peaks[part.split()[0]] for part, flop in parts.items()) / seconds


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    write_workload(folder, width=arguments.width, mlp_width=arguments.mlp_width, layers=arguments.layers)
    moments = FactoredMoments(folder / "second_moments.safetensors", folder=folder / "factors", digest="benchmark")
    start = cpu_seconds()
    for layer in range(arguments.layers - 1):
        moments.load_factor(layer)
    say(f"factors computed and written once: {cpu_seconds() - start:.1f} s of CPU")
    peaks = {"float32": matmul_peak(torch.float32), "float64": matmul_peak(torch.float64)}
    say(f"matrix products, a CPU second: {', '.join(f'{peak / 1e9:.0f} GFLOP {name}' for name, peak in peaks.items())}")
    rows = []
    for edits in sorted(arguments.edits):
        work = Workload(folder, edits=edits)
        for mode in arguments.modes:
            row: dict[str, Any] = {"edits": edits, "mode": mode, "ours": None, "plain": None, "difference": None}
            flop = count_flop(work, mode, padding=arguments.padding)
            for side in ("ours", "plain"):
                if side == "ours" or edits <= arguments.plain_up_to:
                    row[side] = run_child(arguments, folder, side, edits=edits, mode=mode)
                    row[side]["flop"] = flop[side]
                    row[side]["share_of_peak"] = share_of_peak(flop[side], peaks, row[side]["cpu_seconds"])
                    say(f"{edits} edits, {mode}, {side}: {row[side]['cpu_seconds']:.1f} s of CPU")
            if row["plain"] is not None:
                row["difference"] = difference(folder)
                row["ratio"] = row["plain"]["cpu_seconds"] / row["ours"]["cpu_seconds"]
            rows.append(row)
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> tuple[Table, Table]:
    results, parts = Table(title="Stage II"), Table(title="FLOP")
    for column in ("edits", "mode", "plain CPU s", "ours CPU s", "ours wall s", "ratio", "plain MiB", "ours MiB", "ΔW"):
        results.add_column(column, justify="right")
    for column in ("edits", "mode", "implementation", "part", "GFLOP", "share of peak"):
        parts.add_column(column, justify="right")
    for row in rows:
        mine, other, run = row["ours"], row["plain"], (str(row["edits"]), row["mode"])
        results.add_row(
            *run,
            f"{other['cpu_seconds']:.1f}" if other else "-",
            f"{mine['cpu_seconds']:.1f}",
            f"{mine['wall_seconds']:.1f}",
            f"{row['ratio']:.1f}" if other else "-",
            f"{other['peak_bytes_over_model'] / 2**20:.0f}" if other else "-",
            f"{mine['peak_bytes_over_model'] / 2**20:.0f}",
            f"{row['difference']:.1e}" if other else "-",
        )
        for name in ("plain", "ours"):
            for part, flop in (row[name] or {"flop": {}})["flop"].items():
                parts.add_row(*run, name, part, f"{flop / 1e9:.0f}", f"{row[name]['share_of_peak']:.0%}")
    return results, parts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--modes", nargs="+", choices=["published", "spread"], default=["published", "spread"])
    parser.add_argument("--repeats", type=int, default=3, help="the median is shown")
    parser.add_argument("--padding", choices=["full", "longest"], default="full", help="of the plain implementation")
    parser.add_argument("--plain-up-to", type=int, default=sys.maxsize, metavar="EDITS", help="above, ours runs alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--mlp-width", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--child", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.child:
        print(json.dumps(measure(chosen, chosen.folder)))  # noqa: T201
        return 0
    with tempfile.TemporaryDirectory(prefix="stage-two-") as folder:
        rows = compare(chosen, Path(folder))
    for table in tables(rows):
        Console(width=130).print(table)
    compared = [row for row in rows if row["plain"]]
    ratio = next((row["ratio"] for row in reversed(compared) if row["mode"] == "published"), None)
    summary = {"ratio": ratio, "tolerance": TOLERANCE, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if chosen.json:
        chosen.json.write_text(json.dumps(summary | {"rows": rows}, indent=2) + "\n")
    agree = all(math.isfinite(row["difference"]) and row["difference"] <= TOLERANCE for row in compared)
    if not agree:
        say(f"the two differ by more than {TOLERANCE}")
    print(json.dumps(summary | {"rows": rows}))  # noqa: T201
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
