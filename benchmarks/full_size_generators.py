"""Hybrid edits through generators of full size, on a GPU.

    python -m benchmarks.full_size_generators --json full_size_generators.json

One pipeline has the size of Stable Diffusion 1.5 at 512 by 512, the other that of Z-Image (a transformer of 6 billion
parameters and Qwen3-4B) at 512 by 512. Weights are random. The generator's weights are bfloat16, as the worker has
them. "autocast" is the way that they replace: float32 weights, which each pass converts.

Stage I has its default settings but for the number of its steps: four fifths use the text alone, and `--steps` use the
generator. "s, 40 steps" is the time of the default 40 such steps: what comes before the first, and 40 times the mean of
the others. The command starts with one edit that is not measured.

The last line on stdout is JSON.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.full_size_encoders import SIZES, WORDS, write_tokenizer
from benchmarks.measuring import TOKENIZER, say
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.encoders.base import TextEncoder
from editing.encoders.clip import ClipEncoder
from editing.encoders.decoder import DecoderEncoder
from editing.families.registry import FAMILIES
from editing.generators.autoencoder import Autoencoder
from editing.generators.diffusion import build_solver
from editing.generators.generator import Generator
from editing.generators.unet import UNet
from editing.generators.z_image import ZImage
from editing.pipelines import EditablePipeline
from editing.prompts import PromptTokenizer
from editing.stage_one.optimize import StageOneProgress, optimize_values
from editing.values import EditValue

DEFAULT_STEPS = 40  # of stage I that use the generator


@dataclass(frozen=True)
class Sizes:
    """The sizes of a pipeline's networks, where they are not the defaults of their classes."""

    text: dict[str, Any]
    network: dict[str, Any]
    autoencoder: dict[str, Any]
    image: int
    """Height and width in pixels."""
    concepts: tuple[int, ...]
    """How many are optimized together, in each row of the table."""


_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_AUTOENCODER: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, **_BLOCKS}
PIPELINES = {
    "sd1.5": Sizes(
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"sample_size": 64, "cross_attention_dim": 768},
        _AUTOENCODER,
        512,
        (1, 8),
    ),
    "z-image": Sizes(SIZES["qwen3-4b"].config, {}, {**_AUTOENCODER, "latent_channels": 16}, 512, (1,)),
}


def build_pipeline(name: str, *, device: torch.device, dtype: torch.dtype) -> EditablePipeline:
    """Build a pipeline with random weights; the generator's are of this dtype."""
    sizes = PIPELINES[name]
    torch.manual_seed(0)
    vae = Autoencoder(create(lambda: AutoencoderKL(**sizes.autoencoder), device))
    build = build_z_image if name == "z-image" else build_stable_diffusion
    encoder, generator = build(sizes, vae, device, dtype)
    return EditablePipeline(encoders=(encoder,), generator=generator)


def build_stable_diffusion(
    sizes: Sizes, vae: Autoencoder, device: torch.device, dtype: torch.dtype
) -> tuple[TextEncoder, Generator]:
    tokenizer = PromptTokenizer.from_folder(TOKENIZER)
    tokenizer.max_length = 77
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **sizes.text)
    text = create(lambda: CLIPTextModel(config), device)
    network = create(lambda: UNet2DConditionModel(**sizes.network), device)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = build_solver(dict(DDIMScheduler(**schedule).config))
    network = network.to(dtype, memory_format=torch.channels_last)
    return ClipEncoder(text, tokenizer), UNet(network, vae, scheduler, image_size=(sizes.image, sizes.image))


def build_z_image(
    sizes: Sizes, vae: Autoencoder, device: torch.device, dtype: torch.dtype
) -> tuple[TextEncoder, Generator]:
    family = FAMILIES["z_image"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = write_tokenizer(Path(folder), chat=True)
        tokenizer = PromptTokenizer.from_folder(Path(folder), format=family.encoders[0].format)
    text = create(lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes.text)), device)
    options = {"cap_feat_dim": sizes.text["hidden_size"], **sizes.network}
    network = create(lambda: ZImageTransformer2DModel(**options), device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    generator = ZImage(network.to(dtype), vae, scheduler, image_size=(sizes.image, sizes.image), index={})
    return DecoderEncoder(text, tokenizer, family=family.name), generator


def create(build: Callable[[], nn.Module], device: torch.device) -> Any:
    """Create a network whose matrices keep the length of states: some classes leave theirs uninitialized."""
    with torch.device(device), torch.no_grad():
        module = build()
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return module.requires_grad_(False).eval()


def describe_edits(name: str, concepts: int, *, steps: int) -> list[ConceptEdit]:
    """Describe edits with the default settings, but for the number of steps and the guidance of Z-Image-Turbo."""
    turbo: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 0.0} if name == "z-image" else {}
    settings = StageOneSettings(optimization_steps=5 * steps, warmup_steps=4 * steps, **turbo)
    return [
        ConceptEdit(f"w{number} w{number + WORDS // 2}", DestinationPrompt(f"w{number + 1}"), settings=settings)
        for number in range(concepts)
    ]


def measure(pipeline: EditablePipeline, edits: Sequence[ConceptEdit], *, steps: int) -> dict[str, Any]:
    """Optimize the edits together and return the cost."""
    device = pipeline.device
    on_gpu = device.type == "cuda"
    times: list[float] = []  # of the steps that use the generator

    def note(progress: StageOneProgress) -> None:
        if progress.edit_index == 0 and progress.step > progress.steps - steps:
            times.append(time.perf_counter())

    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    outcomes = optimize_values(pipeline, edits, progress=note)
    failed = [outcome for outcome in outcomes if not isinstance(outcome, EditValue)]
    if failed:
        raise failed[0]
    step = (times[-1] - times[0]) / (len(times) - 1)
    return {
        "concepts": len(edits),
        "step_seconds": step,
        "seconds": times[0] - start + (DEFAULT_STEPS - 1) * step,
        "latents": pipeline.generator.chunks.size,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def run_rows(names: Sequence[str], *, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Measure each pipeline with bfloat16 weights, and the smallest one with autocast."""
    rows = []
    for name in names:
        for weights in ("bfloat16", "autocast") if name == "sd1.5" else ("bfloat16",):
            autocast = weights == "autocast"
            pipeline = build_pipeline(name, device=device, dtype=torch.float32 if autocast else torch.bfloat16)
            if autocast:
                predict_with_autocast(pipeline.generator)
            optimize_values(pipeline, describe_edits(name, 1, steps=1))  # libraries load their kernels
            for concepts in PIPELINES[name].concepts[: 1 if autocast else None]:
                measured = measure(pipeline, describe_edits(name, concepts, steps=steps), steps=steps)
                rows.append({"pipeline": name, "weights": weights, **measured})
                say(json.dumps(rows[-1]))
            del pipeline
            gc.collect()
    return rows


def predict_with_autocast(generator: Generator) -> None:
    """Let a generator with float32 weights compute in bfloat16."""
    predict: Callable[..., torch.Tensor] = generator.predict

    def autocast() -> AbstractContextManager[Any]:
        is_cpu = generator.device.type == "cpu"
        return nullcontext() if is_cpu else torch.autocast(generator.device.type, dtype=torch.bfloat16)

    def predict_in_bfloat16(*inputs: Any) -> torch.Tensor:
        with autocast():
            return predict(*inputs)

    generator.predict = predict_in_bfloat16  # type: ignore[assignment, method-assign]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    result = Table(title="Hybrid edits at full size")
    for column in ("pipeline", "weights", "concepts", "s a step", "s, 40 steps", "latents at a time", "peak GiB"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            row["pipeline"],
            row["weights"],
            str(row["concepts"]),
            f"{row['step_seconds']:.3f}",
            f"{row['seconds']:.1f}",
            str(row["latents"]),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        )
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", nargs="+", choices=[*PIPELINES], default=[*PIPELINES])
    parser.add_argument("--steps", type=int, default=10, help="steps that use the generator, at least 2")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    device = torch.device(chosen.device)
    rows = run_rows(chosen.pipeline, device=device, steps=chosen.steps)
    Console(width=120).print(table(rows))
    summary = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "rows": rows,
    }
    if chosen.json:
        chosen.json.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
