"""A training loop that can be stopped at any time and goes on where it was.

Everything random in a step comes from a generator seeded with (seed, step, rank), so that a resumed run draws what an
uninterrupted one draws. Checkpoints are safetensors for the tensors and JSON for the rest; nothing is pickled.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

STATE = "state.json"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains: linear warm-up to `rate`, constant until `decay_from`, cosine to
    `last_rate`."""

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

    def rate_at(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        start = self.decay_from * self.steps
        if step < start:
            return self.rate
        done = min((step - start) / max(self.steps - start, 1), 1.0)
        return self.rate * (self.last_rate + (1 - self.last_rate) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Training:
    """One stage: the modules it trains and where its checkpoints lie.

    `kept` are tensors that travel with the checkpoint without being trained (a moving average, say). Only rank 0
    writes.
    """

    folder: Path
    name: str
    modules: Mapping[str, nn.Module]
    schedule: Schedule
    seed: int = 0
    rank: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        self.parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.schedule.rate, betas=(0.9, 0.99), weight_decay=self.schedule.weight_decay
        )

    def generator(self) -> torch.Generator:
        """Return the source of this step's randomness."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.step * 1_009 + self.rank)

    def run(
        self,
        loss: Callable[[torch.Generator], Mapping[str, Tensor]],
        *,
        before_update: Callable[[], None] | None = None,
        after_update: Callable[[], None] | None = None,
        sample: Callable[[int], None] | None = None,
    ) -> None:
        """Train until the schedule's last step. `loss` returns the term to minimise under "loss" and others to show."""
        bar = tqdm(
            total=self.schedule.steps,
            initial=self.step,
            desc=self.name,
            unit="step",
            disable=self.rank > 0,
            mininterval=5.0,
        )
        shown: dict[str, float] = {}
        while self.step < self.schedule.steps:
            rate = self.schedule.rate_at(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            terms = loss(self.generator())
            self.optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            if before_update is not None:
                before_update()
            nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
            self.optimizer.step()
            if after_update is not None:
                after_update()
            self.step += 1
            for key, value in terms.items():
                shown[key] = 0.97 * shown.get(key, value.item()) + 0.03 * value.item()
            bar.set_postfix({key: f"{value:.4f}" for key, value in shown.items()}, refresh=False)
            bar.update()
            if not all(math.isfinite(value) for value in shown.values()):
                raise FloatingPointError(
                    f"{self.name}: the loss is not finite at step {self.step}; lower the rate and resume"
                )
            last = self.step == self.schedule.steps
            if self.rank == 0 and (last or self.step % self.schedule.checkpoint_every == 0):
                self.save(shown)
            if self.rank == 0 and sample is not None and (last or self.step % self.schedule.sample_every == 0):
                sample(self.step)
        bar.close()

    def save(self, shown: Mapping[str, float]) -> None:
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
        state = {"step": self.step, "file": file.name, "seed": self.seed, "shown": dict(shown)}
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
        tensors = load_file(self.folder / state["file"])
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
        self.step = state["step"]
        return True

    @property
    def finished(self) -> bool:
        return self.step >= self.schedule.steps

    @property
    def _state_file(self) -> Path:
        return self.folder / f"{self.name}-{STATE}"


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
