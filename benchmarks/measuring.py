"""What the benchmarks at full size share: an encoder of CLIP-L's kind with random weights, and measurements that are
each a process of their own, so that CPU time (user + system) and peak memory are its own."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from demo.concepts import WEIGHTS
from editing.encoders.clip import ClipEncoder
from editing.prompts import PromptTokenizer

TOKENIZER = WEIGHTS / "pipeline" / "tokenizer"
POSITIONS = 77
T = TypeVar("T")


def write_encoder(folder: Path, *, width: int, mlp_width: int, layers: int) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=POSITIONS,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def read_encoder(folder: Path) -> ClipEncoder:
    """Return the encoder with the emoji model's tokenizer, which splits its captions into words or parts of words."""
    tokenizer = PromptTokenizer.from_folder(TOKENIZER)
    tokenizer.max_length = POSITIONS
    return ClipEncoder(CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False).eval(), tokenizer)


def cpu_seconds() -> float:
    """Of this process so far, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measured(run: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Return a run's result and its cost: CPU and wall seconds, and the peak of the added memory."""
    loaded = psutil.Process().memory_info().rss
    forget_peak()
    start, clock = cpu_seconds(), time.perf_counter()
    result = run()
    seconds, wall = cpu_seconds() - start, time.perf_counter() - clock
    peak = peak_bytes()
    return result, {
        "cpu_seconds": seconds,
        "wall_seconds": wall,
        "peak_bytes_over_model": max(0, peak - loaded),
    }


def forget_peak(pid: int | str = "self") -> None:
    """Let the peak be the present memory: the peak of getrusage begins at that of the parent, and never falls."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int | str = "self") -> int:
    """Return the most resident memory since `forget_peak`."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def child(module: str, *arguments: str) -> Any:
    """Run a benchmark's module with `--child` in its own process. Return the JSON of its last line."""
    command = [sys.executable, "-m", module, "--child", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def is_reachable(url: str) -> bool:
    """Return whether a GET of the URL succeeds."""
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).is_success
    except httpx.TransportError:
        return False


def difference(folder: Path) -> float:
    """Of the files `ours` and `plain`: the largest relative difference of any layer, Frobenius."""
    found, expected = load_file(folder / "ours"), load_file(folder / "plain")
    return max(float((found[layer] - tensor).norm() / tensor.norm()) for layer, tensor in expected.items())


def uvicorn_arguments(factory: str, *, port: int) -> list[str]:
    """Return the arguments of `python -m` that serve an application with the options of the API."""
    options = ["--no-access-log", "--log-level", "warning", "--timeout-graceful-shutdown", "10"]
    return ["uvicorn", factory, "--factory", "--port", str(port), *options]


def say(line: str) -> None:
    """Progress, on stderr: stdout is for the table and the JSON."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
