"""A training loop that can be stopped at any time and goes on where it was.

Everything random in a step comes from a generator seeded with (seed, step, rank), so that a resumed run draws what an
uninterrupted one draws. Checkpoints are safetensors for the tensors and JSON for the rest; nothing is pickled.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

STATE = "state.json"
READ_EVERY = 20  # steps; to read a number waits for the device


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains: linear warm-up to `rate`, constant until `decay_from`, cosine to
    `last_rate`.

    With `seconds` the time decides how far the training is, and `steps` is not used.
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 50
    decay_from: float = 0.3  # share of the steps
    last_rate: float = 0.02  # share of `rate`
    weight_decay: float = 0.01
    clip: float = 1.0
    checkpoint_every: int = 200
    sample_every: int = 500
    seconds: float | None = None

    def share(self, step: int, seconds: float = 0.0) -> float:
        """Return which share of the training is done after so many steps and seconds."""
        if self.seconds is not None:
            return seconds / self.seconds
        return step / self.steps if self.steps else 1.0

    def rate_at(self, step: int, seconds: float = 0.0) -> float:
        """Return the learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = self.share(step, seconds)
        if share < self.decay_from:
            return self.rate
        done = min((share - self.decay_from) / max(1 - self.decay_from, 1e-9), 1.0)
        return self.rate * (self.last_rate + (1 - self.last_rate) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Training:
    """One stage: the modules it trains and where its checkpoints lie.

    `kept` are tensors that travel with the checkpoint without being trained (a moving average, say). Only rank 0
    writes. `captured` needs a GPU and steps that read nothing back from it; see `CapturedUpdate`. `shown` are the
    smoothed terms of the loss.
    """

    folder: Path
    name: str
    modules: Mapping[str, nn.Module]
    schedule: Schedule
    seed: int = 0
    rank: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    captured: bool = False
    shown: dict[str, float] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0  # that the steps took, those before a resumption included

    def __post_init__(self) -> None:
        self.parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=torch.tensor(self.schedule.rate, device=self.device) if self.captured else self.schedule.rate,
            betas=(0.9, 0.99),
            weight_decay=self.schedule.weight_decay,
            fused=self.device.type == "cuda",
            capturable=self.captured,
        )

    def generator(self) -> torch.Generator:
        """Return the source of this step's randomness."""
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self.step * 1_009 + self.rank)

    def run(
        self,
        loss: Callable[[torch.Generator], Mapping[str, Tensor]],
        *,
        before_update: Callable[[], None] | None = None,
        after_update: Callable[[], None] | None = None,
        sample: Callable[[int], None] | None = None,
    ) -> None:
        """Train to the schedule's end. `loss` returns the term to minimise under "loss" and others to show."""

        def update(generator: torch.Generator) -> dict[str, Tensor]:
            terms = loss(generator)
            self.optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            if before_update is not None:
                before_update()
            nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
            self.optimizer.step()
            return {key: value.detach() for key, value in terms.items()}

        if self.captured:
            update = CapturedUpdate(update)
        bar = tqdm(
            total=self.schedule.steps if self.schedule.seconds is None else None,
            initial=self.step,
            desc=self.name,
            unit="step",
            disable=self.rank > 0,
            mininterval=5.0,
        )
        smoothed: dict[str, Tensor] = {}
        started = time.perf_counter() - self.seconds
        while not self.finished:
            rate = self.schedule.rate_at(self.step, self.seconds)
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            terms = update(self.generator())
            if after_update is not None:
                after_update()
            self.step += 1
            self.seconds = time.perf_counter() - started
            for key, value in terms.items():
                smoothed[key] = smoothed.get(key, value).lerp(value, 0.03)
            bar.update()
            last = self.finished
            if last or any(
                self.step % every == 0
                for every in (READ_EVERY, self.schedule.checkpoint_every, self.schedule.sample_every)
            ):
                self.shown = {key: value.item() for key, value in smoothed.items()}
                bar.set_postfix({key: f"{value:.4f}" for key, value in self.shown.items()}, refresh=False)
                if not all(math.isfinite(value) for value in self.shown.values()):
                    raise FloatingPointError(
                        f"{self.name}: the loss is not finite at step {self.step}; lower the rate and resume"
                    )
            if self.rank == 0 and (last or self.step % self.schedule.checkpoint_every == 0):
                self.save()
            if self.rank == 0 and sample is not None and (last or self.step % self.schedule.sample_every == 0):
                sample(self.step)
        bar.close()

    def save(self) -> None:
        """Write a checkpoint; the state file is replaced last, so that a crash leaves the one before."""
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        tensors |= {f"kept.{key}": value for key, value in self.kept.items()}
        for index, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{key}"] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self.name}-{self.step}.safetensors"
        save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, file)
        state = {"step": self.step, "file": file.name, "seconds": self.seconds, "seed": self.seed, "shown": self.shown}
        partial = self.folder / f"{self.name}-{STATE}.partial"
        partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.replace(partial, self._state_file)
        for old in self.folder.glob(f"{self.name}-*.safetensors"):
            if old != file:
                old.unlink()

    def resume(self) -> bool:
        """Load the last checkpoint if there is one. Raises ValueError when it belongs to another model."""
        if not self._state_file.is_file():
            return False
        state = json.loads(self._state_file.read_text(encoding="utf-8"))
        tensors = load_file(self.folder / state["file"], device=str(self.device))
        try:
            for name, module in self.modules.items():
                module.load_state_dict(_under(tensors, name))
            for key, value in self.kept.items():
                value.copy_(tensors[f"kept.{key}"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"{self.folder / state['file']} does not fit this model; remove it to start afresh"
            ) from error
        for index, parameter in enumerate(self.parameters):
            if moments := _under(tensors, f"optimizer.{index}"):
                self.optimizer.state[parameter] = moments
        self.step, self.seconds = state["step"], state.get("seconds", 0.0)
        return True

    @property
    def finished(self) -> bool:
        return self.schedule.share(self.step, self.seconds) >= 1

    @property
    def _state_file(self) -> Path:
        return self.folder / f"{self.name}-{STATE}"


class CapturedUpdate:
    """An update that a CUDA graph replays: one launch in place of thousands.

    The first updates run as they are, on a stream of their own, which capturing needs.
    """

    def __init__(self, update: Callable[[torch.Generator], dict[str, Tensor]], *, warmup: int = 3) -> None:
        self.update, self.warmup = update, warmup
        self.stream = torch.cuda.Stream()
        self.generator = torch.Generator("cuda")
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        self.generator.manual_seed(generator.initial_seed())
        if self.warmup:
            self.warmup -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                terms = self.update(self.generator)
            torch.cuda.current_stream().wait_stream(self.stream)
            return terms
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.terms = self.update(self.generator)
        self.graph.replay()
        return self.terms


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def trained(folder: Path, name: str, module: str) -> dict[str, Tensor]:
    """Load the state of `module` in the last checkpoint of stage `name`. Raises FileNotFoundError naming the stage to
    run."""
    state_file = folder / f"{name}-{STATE}"
    if not state_file.is_file():
        raise FileNotFoundError(f"{folder} has no checkpoint of {name}; run `python -m demo.train {name}` first")
    tensors = load_file(folder / json.loads(state_file.read_text(encoding="utf-8"))["file"])
    return _under(tensors, module)
