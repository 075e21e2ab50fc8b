"""Train the pipeline from random weights: `python -m demo.sd3.train`. Interrupted training goes on.

Flow matching as Stable Diffusion 3 has it: x_t = (1-σ) x₀ + σ ε with σ logit-normal, and ε - x₀ is predicted. The text
encoders are trained with the transformer. Each is left out at random, as the paper does, so that a concept is known
three times. Nothing in the training makes the encoders or the transformer easier to edit.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import T5TokenizerFast

from demo import art
from demo.concepts import read_concepts
from demo.sd3.data import CAPTION_LENGTH, PICTURES, Captions, Pictures, TrainingData, draw_captions, encode_art
from demo.sd3.draw import FOLDER
from demo.sd3.pipeline import PIPELINE_LENGTH, T5_LENGTH, Networks, Shape, save_pipeline
from demo.sd3.tokenizer import build_t5_tokenizer, load_clip_tokenizer
from demo.train.loop import Schedule, Training

NAME = "sd3"
CAPTIONS = 100_000
DROPPED_SHARE = 0.3  # of each text encoder; the paper has 0.463
LONG_SHARE = 0.06  # of the steps, in which T5 reads as many tokens as the pipeline's default
LONG_BATCH_DIVISOR = 4  # so that a long step takes as long as others
NOISE_SPREAD, NOISE_SHIFT = 1.2, 0.4  # σ = sigmoid(1.2 n + 0.4), n normal
EMA = 0.995
WARMUP = 100
LOG_EVERY = 50
CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: until `steps` or `seconds` have passed, linear warm-up, then a cosine to 0."""

    rate: float = 1.2e-3
    batch: int = 512
    steps: int | None = None
    seconds: float | None = None
    warmup: int = WARMUP

    def progress(self, step: int, elapsed: float) -> float:
        """Return how much of the training is done, from 0 to 1."""
        done = [
            0.0 if self.steps is None else step / self.steps,
            0.0 if self.seconds is None else elapsed / self.seconds,
        ]
        return min(1.0, max(done))

    def rate_at(self, step: int, progress: float) -> float:
        return self.rate * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def build_patterns() -> tuple[Tensor, Tensor]:
    """Return what can be kept of three encoders (7, 3), never nothing, and the cumulated probabilities (7,)."""
    kept = torch.tensor([[row >> place & 1 for place in range(3)] for row in range(1, 8)])
    chance = torch.where(kept > 0, 1 - DROPPED_SHARE, DROPPED_SHARE).prod(1)
    return kept.float(), chance.cumsum(0) / chance.sum()


class Loss:
    """The flow-matching loss of a random batch. Nothing of it waits for the device, so that a graph can capture it."""

    def __init__(self, networks: Networks, data: TrainingData, *, batch: int, pad_id: int) -> None:
        self.networks, self.data, self.batch, self.pad_id = networks, data, batch, pad_id
        self.device = data.captions.clip.device
        self.kept, self.chances = (table.to(self.device) for table in build_patterns())

    def __call__(self, length: int) -> Tensor:
        """Return the mean square error with T5 padded to `length` tokens."""
        is_short = length <= T5_LENGTH
        x0, clip_ids, t5_ids = self.data.batch(self.batch if is_short else self.batch // LONG_BATCH_DIVISOR)
        if is_short:
            clip_ids = clip_ids[:, :length]
        t5_ids = torch.nn.functional.pad(t5_ids, (0, length - t5_ids.shape[1]), value=self.pad_id)
        size = len(x0)
        chance = torch.rand(len(clip_ids), device=self.device)
        kept = self.kept[torch.bucketize(chance, self.chances).clamp(max=len(self.kept) - 1)]
        sigmas = torch.sigmoid(NOISE_SPREAD * torch.randn(size, device=self.device) + NOISE_SHIFT)
        noise, sigma = torch.randn_like(x0), sigmas[:, None, None, None]
        # Without the cache a captured graph casts the weights anew at each replay.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            states, pooled = self.networks.encode(clip_ids, t5_ids, kept)
            condition = states.repeat(PICTURES, 1, 1), pooled.repeat(PICTURES, 1)
            predicted = self.networks.predict((1 - sigma) * x0 + sigma * noise, sigmas, condition)
        return (predicted.float() - (noise - x0)).square().mean()


class Gradients:
    """Computes gradients of a loss, on a GPU by graphs that are captured once: else launching kernels takes longest."""

    def __init__(self, loss: Callable[[int], Tensor], parameters: Sequence[Tensor], *, captured: bool) -> None:
        self.loss, self.captured = loss, captured
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def compute(self, length: int) -> Tensor:
        """Replace the gradients by those of a new batch and return its loss, a tensor that the next call overwrites."""
        if not self.captured:
            return self._compute(length)
        if length not in self._graphs:
            self._graphs[length] = self._capture(length)
        graph, loss = self._graphs[length]
        graph.replay()
        return loss

    def _compute(self, length: int) -> Tensor:
        torch._foreach_zero_(self.gradients)
        loss = self.loss(length)
        loss.backward()
        return loss.detach()

    def _capture(self, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries allocate and choose kernels in their first calls
                self._compute(length)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)  # graphs run one after another
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            loss = self._compute(length)
        return graph, loss


def train(
    networks: Networks,
    data: TrainingData,
    folder: Path,
    plan: Plan,
    *,
    pad_id: int,
    seed: int = 0,
    captured: bool = False,
    lengths: tuple[int, int] = (CAPTION_LENGTH, PIPELINE_LENGTH),
) -> Networks:
    """Train, or go on training, and return the networks with the moving average of their weights."""
    device = data.captions.clip.device
    # Of parameters: the state names T5's embeddings twice.
    trained = dict(networks.named_parameters())
    average = {name: parameter.detach().clone() for name, parameter in trained.items()}
    # Only checkpoints are its: its loop knows one kind of step, and here short and long ones alternate.
    training = Training(folder, NAME, {"model": networks}, Schedule(0, plan.batch, plan.rate), seed=seed, kept=average)
    training.optimizer = torch.optim.AdamW(
        training.parameters, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    training.resume()
    before = training.seconds
    torch.manual_seed(seed + training.step)
    loss = Loss(networks, data, batch=plan.batch, pad_id=pad_id)
    gradients = Gradients(loss, training.parameters, captured=captured)
    started = saved = logged = time.perf_counter()
    logged_step = training.step
    progress = plan.progress(training.step, before)
    smoothed = torch.zeros((), device=device)
    folder.mkdir(parents=True, exist_ok=True)

    while progress < 1:
        step = training.step
        for group in training.optimizer.param_groups:
            group["lr"] = plan.rate_at(step, progress)
        # In a fixed pattern: each length once in so many steps.
        is_long = int((step + 1) * LONG_SHARE) > int(step * LONG_SHARE)
        smoothed += gradients.compute(lengths[is_long])
        torch.nn.utils.clip_grad_norm_(training.parameters, 1.0)
        training.optimizer.step()
        torch._foreach_lerp_(list(average.values()), list(trained.values()), 1 - min(EMA, (1 + step) / (10 + step)))
        training.step += 1
        if device.type == "cuda" and training.step % 10 == 0:
            torch.cuda.synchronize()  # so that the time measured is that of the steps
        now = time.perf_counter()
        training.seconds = before + now - started
        progress = plan.progress(training.step, training.seconds)
        if training.step % LOG_EVERY == 0 or progress >= 1:
            count, logged_step = training.step - logged_step, training.step
            mean = smoothed.item() / count
            smoothed.zero_()
            line = json.dumps(
                {
                    "step": training.step,
                    "loss": mean,
                    "seconds": training.seconds,
                    "ms_per_step": 1000 * (now - logged) / count,
                }
            )
            logged = now
            with (folder / f"{NAME}.jsonl").open("a", encoding="utf-8") as curve:
                curve.write(line + "\n")
            tqdm.write(line)
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is not finite at step {training.step}; lower the rate and resume")
        if now - saved > CHECKPOINT_SECONDS:
            training.save()
            saved = time.perf_counter()
    training.save()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(average[name])
    return networks.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.sd3.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=art.WORK,
        help="folder of art.safetensors or sd3-latents.safetensors, and of checkpoints (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pipeline (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=Plan.batch, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="steps in all")
    parser.add_argument("--seconds", type=float, help="seconds in all, if they pass before the steps")
    parser.add_argument("--rate", type=float, default=Plan.rate, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="captions to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of captions, weights and steps (default: %(default)s)")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="begin with the weights of this pipeline")
    parser.add_argument("--no-graphs", action="store_true", help="launch each kernel of a step, also on a GPU")
    parser.add_argument("--prepare", action="store_true", help="only encode the art")
    given = parser.parse_args(arguments)
    latents_file = given.work / "sd3-latents.safetensors"
    if not latents_file.is_file():
        art_file = given.work / "art.safetensors"
        if not art_file.is_file():
            art.prepare(art.install_packages(given.work / "art"), art_file)
        encode_art(latents_file, art_file)
    if given.prepare:
        return
    if given.steps is None and given.seconds is None:
        parser.error("give --steps or --seconds")

    concepts = read_concepts()
    captions = draw_captions(concepts, count=given.captions, seed=given.seed)
    clip_tokenizer = load_clip_tokenizer()
    if given.init:
        t5_tokenizer = T5TokenizerFast.from_pretrained(given.init / "tokenizer_3", local_files_only=True)
    else:
        t5_tokenizer = build_t5_tokenizer(caption.text for caption in captions)
    data = TrainingData(
        Captions.tokenize(captions, clip_tokenizer, t5_tokenizer), Pictures.load(latents_file, concepts)
    )
    torch.manual_seed(given.seed)
    device = torch.device(given.device)
    torch.set_float32_matmul_precision("high")
    networks = Networks(clip_tokenizer, t5_tokenizer, Shape())
    if given.init:
        networks.read(given.init)
    networks.to(device)
    plan = Plan(given.rate, given.batch, given.steps, given.seconds)
    trained = train(
        networks,
        data.to(device),
        given.work / "checkpoints",
        plan,
        pad_id=t5_tokenizer.pad_token_id,
        seed=given.seed,
        captured=device.type == "cuda" and not given.no_graphs,
    )
    save_pipeline(trained.cpu(), clip_tokenizer, t5_tokenizer, given.out)


if __name__ == "__main__":
    main()
